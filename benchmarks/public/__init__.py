"""The papers' benchmark on a model of diffusers, with the public lists of prompts."""
