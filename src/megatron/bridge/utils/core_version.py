# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""A Megatron-Core newer than any that was tested: said once, and the run continues.

Nothing here is refused by its version. Where a later Core has lost what is used of it, the place that needs it says so.
"""

import logging
import re

from megatron.core import __version__ as core_version

logger = logging.getLogger(__name__)

NEWEST_TESTED_CORE = "0.19.2"


def warn_of_an_untested_core(installed: str | None = None) -> bool:
    """Log one warning where a Core (by default the installed one) is newer than the newest tested; whether it is."""
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
    """The release: "0.20.0rc1+abc" is (0, 20, 0). Empty where there is none."""
    release = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in release[0].split(".")) if release else ()
