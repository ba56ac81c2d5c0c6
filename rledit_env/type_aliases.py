"""Names for dictionaries whose values are of many types, which whoever reads a value knows or checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

JsonObject = dict[str, Any]  # an object of a JSON file
Settings = Mapping[str, Any]  # fields of a configuration, or arguments of a function, by name; read only
Options = dict[str, Any]  # the same, for whoever gets them to change: such as the `options` of Gymnasium's `reset`
Info = dict[str, Any]  # the last part of what Gymnasium's `reset` and `step` return
