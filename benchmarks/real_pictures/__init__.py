"""The command line on real pictures: recall, false alarms, time and memory of each verb."""
