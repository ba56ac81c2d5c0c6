"""Command-line flags that tyro generates from configuration dataclasses, beside those written by hand for argparse."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any, get_type_hints

from rledit_env.type_aliases import Options


@dataclass(frozen=True)
class ConfigFlags:
    """The flags of one configuration dataclass.

    Attributes:
        config: the dataclass; its docstring's Attributes section is the flags' help.
        leave_out: the fields that get no flags.
        types: types that replace the dataclass's own, by field.
        about: the help's text before the flags, instead of the docstring's first lines.
        default: returns the configuration with the flags' defaults, given the options that argparse parsed; None takes
            the dataclass's own defaults.
    """

    config: type
    leave_out: Sequence[str] = ()
    types: Mapping[str, object] = field(default_factory=dict)
    about: str | None = None
    default: Callable[[argparse.Namespace], object] | None = None

    @property
    def hints(self) -> dict[str, object]:
        """The types of the fields that are flags, by name."""
        hints = get_type_hints(self.config) | dict(self.types)
        return {f.name: hints[f.name] for f in fields(self.config) if f.name not in self.leave_out}

    @property
    def flags(self) -> list[str]:
        """The flags as written on the command line."""
        options = [(name.replace("_", "-"), hint) for name, hint in self.hints.items()]
        return [f"--{option}" for option, _ in options] + [f"--no-{option}" for option, hint in options if hint is bool]

    def unchecked(self, options: argparse.Namespace) -> type:
        """A dataclass of the flags' fields with their defaults. It accepts any value of the right type; the command
        reports values that the configuration refuses."""
        default = self.default(options) if self.default is not None else self.config()
        members = [(name, hint, field(default=getattr(default, name))) for name, hint in self.hints.items()]
        about, heading, attributes = _plain(self.config.__doc__ or "").partition("Attributes:")
        docstring = f"{self.about or about}\n\n{heading}{attributes}"
        return make_dataclass(self.config.__name__, members, namespace={"__doc__": docstring})


class CommandParser(argparse.ArgumentParser):
    """A command's parser. argparse parses the arguments of ``add_argument``, tyro the flags of :meth:`add_config`.

    Both write into one namespace, a configuration's fields by their names.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.configs: dict[str, ConfigFlags] = {}

    def add_config(self, title: str, config: type, **more: Any) -> None:
        """Add a flag for each field of a configuration dataclass.

        Args:
            title: the flags' heading in the help.
            config: the dataclass.
            more: see `ConfigFlags`.
        """
        self.configs[title] = ConfigFlags(config, **more)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if not self.configs:
            return super().parse_known_args(args, namespace)
        generated, others = self._split(args)
        options, unknown = super().parse_known_args(others, namespace)
        for values in vars(self._by_tyro(options, generated, add_help=False)).values():
            for name, value in vars(values).items():
                setattr(options, name, value)
        return options, unknown

    def format_help(self) -> str:
        if not self.configs:
            return super().format_help()
        examples, self.epilog = self.epilog, None
        try:
            by_hand = super().format_help()
        finally:
            self.epilog = examples
        return f"{by_hand}\n{self._generated_help()}\n\n{examples}"

    def _split(self, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
        """The generated flags with their values, and the other arguments."""
        flags = [flag for config in self.configs.values() for flag in config.flags]
        generated: list[str] = []
        others: list[str] = []
        target = others
        for argument in arguments:
            if re.match(r"--?[A-Za-z]", argument):
                flag, *value = argument.split("=", 1)
                flag = self._in_full(flag, [*flags, *self._option_string_actions])
                argument = "=".join([flag, *value])
                target = generated if flag in flags else others
            target.append(argument)
        return generated, others

    def _in_full(self, flag: str, known: Sequence[str]) -> str:
        """The full name of a flag, which may be abbreviated as in argparse: to first letters that only one flag has."""
        matches = [name for name in known if name.startswith(flag)]
        if flag in known or not flag.startswith("--") or not matches:
            return flag
        if len(matches) > 1:
            self.error(f"ambiguous option: {flag} could match {', '.join(matches)}")
        return matches[0]

    def _by_tyro(self, options: argparse.Namespace, arguments: Sequence[str], add_help: bool) -> object:
        """Parse the generated flags with tyro; returns an object with one dataclass a title."""
        import tyro

        classes = {title: config.unchecked(options) for title, config in self.configs.items()}
        members = [(title, settings, field(default_factory=settings)) for title, settings in classes.items()]
        all_settings, flat = make_dataclass("Settings", members), (tyro.conf.OmitArgPrefixes,)
        return tyro.cli(all_settings, prog=self.prog, args=arguments, add_help=add_help, config=flat)

    def _generated_help(self) -> str:
        """tyro's help of the generated flags."""
        defaults = argparse.Namespace(**{action.dest: action.default for action in self._actions})
        with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
            self._by_tyro(defaults, ["--help"], add_help=True)
        # argparse's help has the lines up to this one already.
        _, _, sections = text.getvalue().partition("show this help message and exit")
        return "\n".join(line.rstrip() for line in sections.splitlines()[1:]).strip("\n")


def _plain(docstring: str) -> str:
    """A docstring without markup, with one line for each attribute."""
    text = re.sub(r"\n {8,}", " ", inspect.cleandoc(docstring))
    text = re.sub(r":\w+:`", "`", text).replace("``", "`")
    each = re.compile(r"^ {4}(\w+(?:, \w+)+): (.*)$", re.MULTILINE)
    return each.sub(lambda m: "\n".join(f"    {name}: {m[2]}" for name in m[1].split(", ")), text)


def values_of(options: argparse.Namespace, config: type) -> Options:
    """The values of the options that are fields of a configuration, by name."""
    return {f.name: getattr(options, f.name) for f in fields(config) if f.name in options}
