# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Warn once of a Megatron-Core that is newer than any tested one. The run continues.

No Core is refused by its version. If a later Core lacks something that we use, the code that needs it raises.
"""

import logging
import re

from megatron.core import __version__ as core_version

logger = logging.getLogger(__name__)

NEWEST_TESTED_CORE = "0.19.2"


def warn_of_an_untested_core(installed: str | None = None) -> bool:
    """Log a warning if a Core (by default the installed one) is newer than the newest tested. Returns whether it is."""
    installed = installed or core_version
    newer = _numbers(installed) > _numbers(NEWEST_TESTED_CORE)
    if newer:
        logger.warning(
            "megatron-core %s is newer than the newest tested (%s): the run continues; repairs are chosen by looking "
            "at its code, and what it no longer has is named where it is needed",
            installed,
            NEWEST_TESTED_CORE,
        )
    return newer


def _numbers(version: str) -> tuple[int, ...]:
    """The numbers of a release: "0.20.0rc1+abc" is (0, 20, 0). Empty if there are none."""
    release = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in release[0].split(".")) if release else ()
