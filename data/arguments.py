"""What the programs share: the ranges of their arguments, and the sentence of an error."""
import math


def check_ranges(args, **ranges):
    """Raises ValueError where an argument is set and outside of its range, name=(least, most or None)."""
    for name, (least, most) in ranges.items():
        value = getattr(args, name)
        if value is None or (least <= value < math.inf and (most is None or value <= most)):
            continue
        option = "--" + name.replace("_", "-")
        raise ValueError(f"{option} is {value}: " + (f"it should be at least {least}" if most is None else
                                                     f"take {least} to {most}"))


def sentence_of(error):
    """An error's sentence. That of a data process is the end of a traceback."""
    return str(error).strip().splitlines()[-1].removeprefix("ValueError: ")
