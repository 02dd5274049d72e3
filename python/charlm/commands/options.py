"""The options of charlm train: one for every setting, in groups, and a guess at misspelt ones."""

import difflib
from collections.abc import Callable, Collection
from typing import Any

import click

from charlm.settings import GROUPS, Range, setting_type, settings

# What other programs call it.
_SYNONYMS = {
    "--learning-rate": "--lr",
    "--alpha": "--lr",
    "--hidden-size": "--hidden",
    "--hidden-dim": "--hidden",
    "--units": "--hidden",
    "--num-layers": "--layers",
    "--embedding-dim": "--embedding",
    "--seq-length": "--window",
    "--seq-len": "--window",
    "--block-size": "--window",
    "--bptt": "--window",
    "--batch": "--batch-size",
    "--num-epochs": "--epochs",
    "--iterations": "--steps",
    "--max-iters": "--steps",
    "--drop-prob": "--dropout",
    "--grad-clip": "--clip",
    "--model": "--cell",
    "--rnn": "--cell",
    "--optim": "--optimizer",
    "--optimiser": "--optimizer",
    "--scheduler": "--schedule",
    "--data": "--text",
    "--file": "--text",
    "--input": "--text",
    "--out": "--run",
    "--output": "--run",
    "--eval-freq": "--eval-every",
    "--eval-iter": "--eval-batches",
}


class _Part(click.ParamType):
    """FIRST:END, two counts of characters."""

    name = "FIRST:END"

    def convert(self, value: Any, param: Any, context: Any) -> Any:
        if isinstance(value, tuple):
            return value
        first, _, end = value.partition(":")
        if not (first.isdecimal() and end.isdecimal()):
            self.fail(f"{value!r} isn't FIRST:END, such as 1380:8230", param, context)
        return int(first), int(end)


class GroupedOption(click.Option):
    """An option that knows the group that the help shows it in."""

    def __init__(self, *arguments: Any, group: str = "", **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        self.group = group


class GroupedCommand(click.Command):
    """Shows options by group, in the order in which the groups are first met."""

    def parse_args(self, context: click.Context, arguments: list[str]) -> list[str]:
        try:
            return super().parse_args(context, arguments)
        except click.NoSuchOption as error:
            known = [name for option in self.params for name in option.opts]
            near = difflib.get_close_matches(error.option_name, known, n=1)
            synonym = _SYNONYMS.get(error.option_name)
            meant = [synonym] if synonym else near
            hint = "".join(f" Did you mean {name!r}?" for name in meant)
            message = f"No such option {error.option_name!r}.{hint}"
            raise click.UsageError(message, context) from None

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for option in self.get_params(context):
            record = option.get_help_record(context)
            if record is not None:
                groups.setdefault(getattr(option, "group", "run"), []).append(record)
        for group, records in groups.items():
            with formatter.section(f"{group.capitalize()} options"):
                formatter.write_dl(records)


def setting_options(leave_out: Collection[str]) -> Callable[[Any], Any]:
    """A decorator: an option for every setting, group by group, but for those named."""

    def decorate(function: Any) -> Any:
        fields = [field for field in settings() if field.name not in leave_out]
        fields.sort(key=lambda field: GROUPS.index(field.metadata["group"]))
        for field in reversed(fields):
            flag = "--" + field.name.replace("_", "-")
            kind = setting_type(field)
            if kind is bool:
                flag += f"/--no-{flag[2:]}"
            allowed = field.metadata["allowed"]
            choices = allowed is not None and not isinstance(allowed, Range)
            function = click.option(
                flag,
                field.name,
                cls=GroupedOption,
                group=field.metadata["group"],
                type=click.Choice(list(allowed)) if choices else _Part() if kind is tuple else kind,
                default=None,
                help=field.metadata["help"],
            )(function)
        return function

    return decorate
