"""Command-line flags made from the fields of a dataclass. Nothing in here is about JEPA.

    image_size: int = flag(96, "side of the image, pixels", low=8)     a field, and --image-size N

    section="The model"             opens a group of --help with this field
    low, high                       bounds that `check_bounds` keeps; above=True: low itself is out
    choices                         all that may be typed
    of={"dataset": ("solids",)}     when the flag is read; under other settings it is refused

Booleans get `--x` and `--no-x`. `restored` is the way back, from what a file holds. Checked in
tests/test_config.py and tests/test_hostile_runs.py.
"""
import argparse
import dataclasses

from plumbing.errors import BadInput, printable


def flag(default, help, *, of=None, section=None, choices=None, low=None, high=None, above=False,
         metavar=None):
    """A field of a settings dataclass, with all that its flag needs."""
    metadata = dict(help=help, of=of or {}, section=section, choices=choices, low=low, high=high,
                    above=above, metavar=metavar)
    return dataclasses.field(default=default, metadata=metadata)


def name_of(field_name):
    """image_size -> --image-size"""
    return "--" + field_name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    """Refuses in one line, without the usage of sixty flags before it."""

    def error(self, message):
        self.exit(2, f"error: {printable(message)}; --help lists what there is\n")


def parser(settings, readers, **options):
    """A Parser with a flag for every field of `settings`, whose values --help shows as defaults.

    readers: field name -> {setting: values under which it is read}, {} = always.
    What is not typed is absent from the result: vars(parser.parse_args()) is what was typed."""
    made = Parser(argument_default=argparse.SUPPRESS, **options)
    group = made
    for field in dataclasses.fields(settings):
        meta = field.metadata
        if meta["section"]:
            group = made.add_argument_group(meta["section"])
        default = getattr(settings, field.name)
        words = [meta["help"], *(f"only {setting} {', '.join(values)}"
                                 for setting, values in readers(field.name).items())]
        kwargs = dict(help=f"{'; '.join(words)} (default: {default})".replace("%", "%%"))
        if field.type is bool:
            group.add_argument(name_of(field.name), action=argparse.BooleanOptionalAction, **kwargs)
        elif meta["choices"]:
            group.add_argument(name_of(field.name), choices=tuple(meta["choices"]), **kwargs)
        else:
            metavar = meta["metavar"] or {int: "N", float: "X", str: "S"}[field.type]
            group.add_argument(name_of(field.name), type=field.type, metavar=metavar, **kwargs)
    return made


def refuse_ignored(typed, settings, readers):
    """Raises BadInput if a typed flag is one that `settings` would not read."""
    for name in typed:
        for setting, values in readers(name).items():
            chosen = getattr(settings, setting)
            if chosen not in values:
                raise BadInput(f"{name_of(name)}: {setting} {chosen} does not read it, only "
                               f"{', '.join(values)}; leave it out")


def check_bounds(settings):
    """Raises BadInput if a field is not within its bounds. NaN is within none."""
    for field in dataclasses.fields(settings):
        low = field.metadata["low"]
        high = field.metadata["high"]
        value = getattr(settings, field.name)
        if low is None:
            continue
        high_enough = value > low if field.metadata["above"] else value >= low
        if high_enough and (high is None or value <= high):
            continue
        words = f"{'above' if field.metadata['above'] else 'at least'} {low:,}"
        if high is not None:
            words += f" and at most {high:,}"
        raise BadInput(f"{name_of(field.name)} {value}: must be {words}")


def restored(kind, values):
    """The settings of dataclass `kind` that a file held: {name: value}. Defaults where it has none.

    Raises: BadInput for a name that this code does not know, or a value that no flag gives."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = values.keys() - fields.keys()
    if unknown:
        raise BadInput("settings that this code does not know "
                       f"({', '.join(sorted(unknown))}); use the code it was made with")
    for name, value in values.items():
        field = fields[name]
        fits = type(value) is field.type or value is field.default
        if field.type is float and type(value) is int:
            fits = True
        if not fits:
            raise BadInput(f"setting {name} is {value!r:.50}, expected a value of type "
                           f"{field.type.__name__}")
        choices = field.metadata["choices"]
        if choices and value not in choices:
            raise BadInput(f"setting {name} is {value!r:.50}, expected one of {', '.join(choices)}")
    settings = kind(**values)
    check_bounds(settings)
    return settings
