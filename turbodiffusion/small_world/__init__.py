"""The small world: captioned clips of animated sprites that move over coloured backgrounds."""
