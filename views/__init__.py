"""Photos in, camera paths, pictures out. Here is what a command line says of them before torch."""

from runtime.command import words

RUN, CONFIG = "out/synth", "configs/synth.py"       # where the command line names neither

# name: (how far it goes unless told, what it does, with that default)
MOTIONS = {
    "orbit": (360.0, "circle around the scene, by 360 degrees"),
    "swing": (20.0, "circle to and fro, by 20 degrees to each side"),
    "spiral": (0.25, "two turns in front of the scene, out to 0.25 and back"),
    "dolly": (0.4, "forwards by 0.4"),
    "truck": (0.4, "to the right by 0.4"),
    "pedestal": (0.3, "upwards by 0.3"),
    "pan": (30.0, "turn to the right on the spot, by 30 degrees"),
    "tilt": (20.0, "turn upwards on the spot, by 20 degrees"),
    "zoom": (1.5, "stay, and narrow the field of view until things look 1.5 times as large"),
}
STEEPEST = 89.0                 # degrees of elevation; straight above, no direction is "up"
FOV = 52.55                     # degrees; what ZeroNVS's own inference takes a photo to have
SCALE = 0.7                     # ZeroNVS's own inference


def add_data_options(parser):
    """Adds the options that name what `views.render.open_run` may open beside a checkpoint."""
    for name, metavar, text in (
            ("--config", "FILE", "whose held-out scenes are used"),
            ("--data", "FOLDER", "where they lie instead; without --config by the run's patterns"),
            ("--init", "FILE", "what a run started from, for the networks that it did not train")):
        parser.add_argument(name, type=words, metavar=metavar, help=text)


def add_model_options(parser):
    """Adds the options of a model, its data and its machine, as `views.render` takes them."""
    add = parser.add_argument
    add("--checkpoint", type=words, default=RUN, metavar="PATH",
        help="a run's folder (its newest step), or a zero123 or ZeroNVS file (%(default)s, with "
             f"--config {CONFIG})")
    add_data_options(parser)
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto",
        help="auto: cuda, then mps, then cpu")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
        help="of the network (auto: bf16 on cuda, else fp32)")
