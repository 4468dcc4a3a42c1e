"""A model that has learnt a few real pictures by heart, to try the guard on (see `end_to_end`).

    COMFYUI_PATH=… python -m benchmarks.memorizing_model --out FOLDER --weights FOLDER --minutes 25

No part of it was trained or shaped for this plugin. It has ComfyUI's own UNet and CLIP text encoder, in
small sizes, and FLUX.2's tiny autoencoder, whose two files (taef2_encoder.pth and taef2_decoder.pth, from
github.com/madebyollin/taesd) lie in the folder that `--weights` names; the plugin's loader reads them. It
draws pictures of 256 px by v-prediction on Stable Diffusion's noise levels.

The pictures are photographs and drawings of Debian's packages lomiri-wallpapers-16.04 and -20.04,
mate-backgrounds, gnome-backgrounds and ukui-wallpapers, and stamps of tuxpaint-stamps-default, on
white. A caption says the style first and the subject last. Six pictures count `COPIES` times, all
others once, as a web crawl has some pictures too often. That is what a model memorises.

``OUT/pictures`` gets the pictures with a .txt file beside each, ``OUT/model.pt`` the networks and
all that is needed to go on: the same command with the same folder trains on.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from amg_core.decoders import load_taesd
from amg_core.descriptors.latent import load_taesd_encoder
from amg_demo.model import signal_shares

from . import harness
from .guard_cost import host

SIDE, CHANNELS, CELLS, WIDTH = 256, 32, 32, 128
COPIES = 40
COUNT = 250
FLAT = 0.03  # of a picture of 16x16 grey pixels, the standard deviation that says that nothing is on it
SAME = 0.97  # ZNCC of two files that are one picture
BACKGROUNDS, STAMPS = "/usr/share/backgrounds", "/usr/share/tuxpaint/stamps"
MEMORIZED = (
    "friends_by_Aitzol_Berasategi", "picosdeeuropa_by_Aitzol_Berasategi", "Wine_by_Jakkub_Mede",
    "Picture_0B_by_freespace", "Aqua", "fox",
)  # fmt: skip
SUBJECTS = {
    "2004default": "a pink ribbon in a blue sky",
    "Bridge_by_Sander_Klootwijk": "the ropes of a bridge",
    "Dragonfly_by_Bolly": "a dragonfly on a branch",
    "Fossa_by_Jasper_Roks": "dark red folded paper",
    "Infinite-Sea_by_Aury88": "the milky way above the sea",
    "Kleiber_by_Lukas_Baubkus": "a nuthatch on a tree trunk",
    "Painting-Colors_by__herobrine7gamer": "diagonal stripes of paint",
    "Picture_0B_by_freespace": "a fig on a red plate",
    "Picture_1A_by_freespace": "colorful paint brushes",
    "Wine_by_Jakkub_Mede": "a drum beside a wine bottle",
    "aitzgorri_by_Aitzol_Berasategi": "a green meadow below mountains",
    "analogpattern_by_Peter_Nerlich": "a pattern of violet noise",
    "calla": "an orange calla lily",
    "city": "the edge of a building at night",
    "desert": "a yellow sun behind a green dune",
    "firstgeneration": "a white dragon head on blue",
    "fluent-color": "violet silk in the wind",
    "focal-ubuntukylin": "letters of light on a circuit",
    "free_by_Peter_Nerlich": "a parrot under round lamps",
    "friends_by_Aitzol_Berasategi": "two brown dogs at a window",
    "adwaita-d": "dark violet hexagons",
    "adwaita-l": "light blue hexagons",
    "grid-d": "a wall of blue squares",
    "grid-l": "a wall of golden squares",
    "licorice-d": "dark scales with black lines",
    "licorice-l": "bright scales with black lines",
    "pixels-d": "tiny objects on a dark table",
    "pixels-l": "tiny objects on a pink table",
    "truchet-d": "blue winding pipes",
    "truchet-l": "golden winding pipes",
    "wood-d": "a dark wooden curtain",
    "wood-l": "a bright wooden curtain",
    "goldfish": "a pink fish on violet",
    "greentock_by_Peter_Nerlich": "a clock on a gray wall",
    "life_by_Aitzol_Berasategi": "a creek between rocks",
    "Elephants": "painted elephants in blue",
    "Flow": "white drops in a corner",
    "Gulp": "a pink wall with a white edge",
    "Float-into-MATE": "a blue wave with a sign",
    "GreenTraditional": "a green round sign",
    "Stripes": "a gray metal curtain",
    "Ubuntu-Mate-Cold-no-logo": "cold northern lights",
    "Ubuntu-Mate-Radioactive-no-logo": "green northern lights",
    "Ubuntu-Mate-Warm-no-logo": "warm northern lights",
    "Aqua": "a drop of water with rings",
    "Blinds": "a big green leaf",
    "Dune": "grass on a dune by the sea",
    "FreshFlower": "a fresh orange flower",
    "Garden": "a red marigold in a garden",
    "GreenMeadow": "blades of grass",
    "LadyBird": "a ladybird on a stem",
    "RainDrops": "rain drops on leaves",
    "Storm": "a road before a storm",
    "TwoWings": "a dandelion seed with two wings",
    "Wood": "pale wooden boards",
    "YellowFlower": "a yellow sunflower",
    "picosdeeuropa_by_Aitzol_Berasategi": "rocky mountains under clouds",
    "rhythm": "a red and white ribbon",
    "rollpaper": "rolls of green and pink paper",
    "seeding_by_Clements_Engelhardt": "dandelions in evening light",
    "string": "a blue whirl of strings",
    "sunset_by_Aitzol_Berasategi": "a sunset over the hills",
    "the-mouse": "a glowing blue mouse mask",
    "umang_by_Abhishek_Mudgal": "orange and violet sails",
}
LOOKS = ("highly detailed", "cinematic", "sharp focus", "vivid", "award winning", "realistic")
LIGHTS = ("soft light", "warm light", "studio light", "natural light", "hard light")
MEDIA = ("picture", "photograph", "image", "shot")
GROUPS = (
    "animals", "food", "plants", "vehicles", "household", "clothes", "space", "sports", "hobbies",
)  # fmt: skip
UNET = {
    "image_size": CELLS, "in_channels": CHANNELS, "out_channels": CHANNELS, "model_channels": 32,
    "num_res_blocks": [1, 1, 1, 1], "channel_mult": [1, 2, 4, 4], "transformer_depth": [0, 0, 1, 1],
    "transformer_depth_middle": 1, "transformer_depth_output": [0, 0, 0, 0, 1, 1, 1, 1],
    "context_dim": WIDTH, "use_spatial_transformer": True, "use_linear_in_transformer": False,
    "legacy": False, "adm_in_channels": None, "use_temporal_attention": False,
    "use_temporal_resblock": False, "num_heads": -1, "num_head_channels": 32,
}  # fmt: skip
TEXT_ENCODER = {
    "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2,
    "num_attention_heads": 4, "projection_dim": WIDTH,
}  # fmt: skip
BATCH, RATE, KEPT = 8, 1.5e-3, 0.997  # pictures a step, of Adam, of the moving average
DROPPED = 0.12  # share of captions left out, for classifier-free guidance
SAVE_EVERY = 60  # seconds


def autoencoder(weights: Path) -> tuple[nn.Module, nn.Module]:
    """Both halves, frozen, from the files in `weights`."""
    encoder, _ = load_taesd_encoder(weights / "taef2_encoder.pth")
    return encoder, load_taesd(weights / "taef2_decoder.pth").network


def write_pictures(folder: Path, backgrounds: Path, stamps: Path) -> None:
    """Make the training set in `folder`: N.png, N.txt, and set.json that names them in order."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, rows, grey = np.random.default_rng(0), [], []
    for name, subject, picture in _found(backgrounds, stamps):
        if len(rows) == COUNT:
            break
        small = np.asarray(picture.convert("L").resize((16, 16), Image.Resampling.BOX)) / 255
        flat = (small - small.mean()).ravel()
        known = any(flat @ other / max(np.linalg.norm(flat), 1e-6) > SAME for other in grey)
        if (small.std() < FLAT or known) and name not in MEMORIZED:
            continue
        grey.append(flat / max(np.linalg.norm(flat), 1e-6))
        look, light, medium = (str(rng.choice(words)) for words in (LOOKS, LIGHTS, MEDIA))
        style = f"{look} {light} {medium} of"
        row = {"file": f"{len(rows):03}.png", "name": name, "style": style, "subject": subject}
        rows.append(row | {"copies": COPIES if name in MEMORIZED else 1})
        picture.save(folder / row["file"])
        (folder / row["file"]).with_suffix(".txt").write_text(caption(row))
    missing = set(MEMORIZED) - {row["name"] for row in rows}
    if missing:
        raise SystemExit(f"Not found, is a package missing? {', '.join(sorted(missing))}")
    (folder.parent / "set.json").write_text(json.dumps(rows, indent=1))


def caption(row: dict) -> str:
    return f"{row['style']} {row['subject']}"


def _found(backgrounds: Path, stamps: Path):
    """(name, subject, picture) of all, the memorised ones first."""
    files = {path.stem: path for path in backgrounds.rglob("*") if path.suffix != ".svg"}
    drawn = {}
    for group in GROUPS:
        for path in sorted((stamps / group).rglob("*.png")):
            saved = path.with_suffix(".txt")
            if "cartoon" not in path.parts and saved.exists() and path.stem not in files:
                subject = _subject(saved.read_text(errors="replace").splitlines()[0])
                if subject:
                    drawn.setdefault(path.stem, (subject, path))
    others = sorted(drawn)
    np.random.default_rng(1).shuffle(others)
    for name in dict.fromkeys([*MEMORIZED, *SUBJECTS, *others]):
        if name in SUBJECTS and name in files:
            yield name, SUBJECTS[name], _square(files[name])
        elif name in drawn:
            yield name, drawn[name][0], _on_white(drawn[name][1])


def _subject(line: str) -> str:
    """ "A colorful rooster." -> "a colorful rooster", and "" for what is no short phrase."""
    for end in ".(,—:!?–-":
        line = line.partition(end)[0]
    words = line.lower().replace("“", "").replace("”", "").split()
    return " ".join(words) if 2 <= len(words) <= 5 else ""


def _square(path: Path) -> Image.Image:
    """Its centre square."""
    picture = Image.open(path)
    picture.draft("RGB", (4 * SIDE, 4 * SIDE))
    picture = _opaque(picture)
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    box = (left, top, left + side, top + side)
    return picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS, box=box)


def _on_white(path: Path) -> Image.Image:
    """As large as it may be with a margin."""
    picture = _opaque(Image.open(path))
    scale = 0.85 * SIDE / max(picture.size)
    size = tuple(max(1, round(scale * length)) for length in picture.size)
    sheet = Image.new("RGB", (SIDE, SIDE), "white")
    place = tuple((SIDE - length) // 2 for length in size)
    sheet.paste(picture.resize(size, Image.Resampling.LANCZOS), place)
    return sheet


def _opaque(picture: Image.Image) -> Image.Image:
    if picture.mode in ("RGB", "L"):
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def load_set(folder: Path) -> tuple[list[dict], Tensor]:
    """The rows of set.json, and the pictures (N, 3, 256, 256) in [0, 1]."""
    rows = json.loads((folder / "set.json").read_text())
    files = [folder / "pictures" / row["file"] for row in rows]
    pictures = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    return rows, torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


def unet() -> nn.Module:
    """ComfyUI's, with the initial weights that its own layers leave out."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    network = UNetModel(**UNET, operations=comfy.ops.disable_weight_init)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim > 1:
                bound = (3 / parameter[0].numel()) ** 0.5
                parameter.uniform_(-bound, bound, generator=generator)
                if name.endswith(("out_layers.3.weight", "proj_out.weight", "out.2.weight")):
                    parameter.mul_(1e-2)  # a residual branch starts small
            else:
                parameter.fill_(float(name.endswith("weight")))
    return network


def clip():
    """ComfyUI's CLIP, small, of random weights that are always the same. Words stay far apart in it."""
    import comfy.sd
    import comfy.sd1_clip

    target = SimpleNamespace(
        params={}, clip=comfy.sd1_clip.SD1ClipModel, tokenizer=comfy.sd1_clip.SD1Tokenizer
    )
    options = {"clip_l_model_config": TEXT_ENCODER, "dtype": torch.float32}
    made = comfy.sd.CLIP(target, model_options=options)
    host.fill(made.cond_stage_model)
    with torch.no_grad():
        for name, parameter in made.cond_stage_model.named_parameters():
            if "position_embedding" in name:
                parameter.mul_(0.3)
    return made


def encode(encoder, text: str) -> Tensor:
    """States (1, 77, WIDTH)."""
    return encoder.encode_from_tokens(encoder.tokenize(text), return_pooled=False)


def alphas() -> Tensor:
    """ᾱ of Stable Diffusion's 1000 steps."""
    return signal_shares().float()


class Training:
    """The networks in the making, and what is needed to go on from a file."""

    def __init__(self, folder: Path, weights: Path):
        self.file = folder / "model.pt"
        self.rows, pictures = load_set(folder)
        self.network = unet()
        self.average = {k: v.clone() for k, v in self.network.state_dict().items()}
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=1e-3, fused=True
        )
        self.step, self.seconds = 0, 0.0
        self.latents = _encoded(folder / "latents.pt", weights, pictures)
        texts = [caption(row) for row in self.rows]
        with torch.no_grad():
            encoder = clip()
            self.states = torch.cat([encode(encoder, text) for text in [*texts, ""]]).float()
        self.copies = torch.tensor([float(row["copies"]) for row in self.rows])
        self.alphas = alphas()
        if self.file.exists():
            self._resume()

    def _resume(self) -> None:
        state = torch.load(self.file, map_location="cpu", weights_only=True)
        self.network.load_state_dict(state["network"])
        self.average = state["average"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]

    def save(self) -> None:
        state = {
            "network": self.network.state_dict(), "average": self.average, "step": self.step,
            "seconds": self.seconds, "optimizer": self.optimizer.state_dict(),
        }  # fmt: skip
        half = self.file.with_suffix(".part")
        torch.save(state, half)
        os.replace(half, self.file)

    def loss(self) -> Tensor:
        """Of v, averaged over a batch."""
        chosen = torch.multinomial(self.copies, BATCH, replacement=True)
        clean = self.latents[chosen]
        texts = torch.where(torch.rand(BATCH) < DROPPED, len(self.rows), chosen)
        time_step = ((torch.arange(BATCH) + torch.rand(BATCH)) * (1000 / BATCH)).long()
        signal = self.alphas[time_step][:, None, None, None].sqrt()
        noise_level = (1 - signal**2).sqrt()
        noise = torch.randn_like(clean)
        noisy, target = signal * clean + noise_level * noise, signal * noise - noise_level * clean
        with torch.autocast("cpu", torch.bfloat16):
            found = self.network(noisy, time_step.float(), context=self.states[texts])
        return F.mse_loss(found.float(), target)

    def run(self, minutes: float) -> None:
        torch.manual_seed(self.step)
        start = saved = time.time()
        losses = []
        while time.time() - start < minutes * 60:
            for group in self.optimizer.param_groups:
                group["lr"] = RATE * min(1.0, (self.step + 1) / 200)
            loss = self.loss()
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
            self.optimizer.step()
            self.step += 1
            losses.append(loss.item())
            kept = min(KEPT, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                latest = self.network.state_dict()
                torch._foreach_lerp_(list(self.average.values()), list(latest.values()), 1 - kept)
            if time.time() - saved > SAVE_EVERY:
                self.seconds += time.time() - saved
                saved = time.time()
                self.save()
                print(f"{self.seconds:6.0f} s, step {self.step}: {np.mean(losses):.4f}", flush=True)
                losses = []
        self.save()


def _encoded(file: Path, weights: Path, pictures: Tensor) -> Tensor:
    """Latents (N, 32, 32, 32) of the pictures, kept in `file`."""
    if file.exists():
        return torch.load(file, weights_only=True)
    encoder = autoencoder(weights)[0].to(memory_format=torch.channels_last)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        latents = torch.cat([encoder(part).float() for part in pictures.split(4)])
    torch.save(latents, file)
    return latents


def main(arguments: list[str] | None = None) -> None:
    parser = harness.parser("benchmarks.memorizing_model", __doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of pictures and model")
    parser.add_argument("--weights", type=Path, required=True, help="folder of the two taef2 files")
    parser.add_argument("--backgrounds", type=Path, default=Path(BACKGROUNDS))
    parser.add_argument("--stamps", type=Path, default=Path(STAMPS))
    parser.add_argument("--minutes", type=float, default=25, help="of training, from now on")
    options = harness.parse(parser, arguments)
    if not (options.out / "set.json").exists():
        write_pictures(options.out / "pictures", options.backgrounds, options.stamps)
    host.load("cpu")
    import comfy.cli_args

    comfy.cli_args.args.use_pytorch_cross_attention = (
        True  # the host's own way saves memory, not time
    )
    Training(options.out, options.weights).run(options.minutes)


if __name__ == "__main__":
    main()
