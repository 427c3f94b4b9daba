"""Scores, comparisons and pictures of runs and data."""


def add_data_options(parser):
    """Adds the options that name what `views.render.open_run` may open beside a checkpoint."""
    for name, metavar, text in (
            ("--config", "FILE", "the configuration of the data"),
            ("--data", "FOLDER", "where held-out shards lie, by the run's own patterns without "
                                 "--config"),
            ("--init", "FILE", "what brings autoencoder and CLIP of a run that lacks them")):
        parser.add_argument(name, default="", metavar=metavar, help=text)
