# Copyright (c) 2026, the Megatron Bridge finetuning authors. Licensed under the Apache License, Version 2.0.
"""Draw the losses of runs from their metrics files (needs matplotlib).

python -m megatron.bridge.plot results/metrics.jsonl another/metrics.jsonl --output loss.png
"""

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from megatron.bridge.utils.exit_codes import exit_with
from megatron.bridge.utils.interpolation import expand_home


def draw(paths: Sequence[str | Path], output: str | Path, *, wanted: list[str] | None = None) -> int:
    """Draw each run's numbers against the step: evaluations dashed, training thin.

    Args:
        paths: Metrics files.
        output: The picture; its ending says the format.
        wanted: Names in the files. None: the losses.

    Returns:
        How many curves there are.

    Raises:
        ValueError: There is nothing to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    for path in paths:
        for (name, split), points in curves(path, wanted).items():
            style = {"alpha": 0.6} if split == "train" else {"linestyle": "--", "marker": "s"}
            label = f"{name} {split}" if len(paths) == 1 else f"{path}: {name} {split}"
            axes.plot(*zip(*points, strict=True), label=label, **style)
    if not axes.lines:
        raise ValueError(f"{', '.join(map(str, paths))}: no numbers named {wanted or 'as a loss'}: nothing to draw")
    axes.set_xlabel("optimizer step")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(output)
    pyplot.close(figure)
    return len(axes.lines)


def curves(path: str | Path, wanted: list[str] | None = None) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """(step, value) points by name and split."""
    # They bring torch, which --help doesn't need.
    from megatron.bridge.training.monitoring.metrics import is_runs_own, read_metrics
    from megatron.bridge.training.monitoring.router_losses import is_router_loss

    found: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for line in read_metrics(path):
        for name, value in line.items():
            is_wanted = name in wanted if wanted else not (is_runs_own(name) or is_router_loss(name))
            if is_wanted and isinstance(value, int | float):
                found.setdefault((name, line["split"]), []).append((line["step"], value))
    return found


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(prog="python -m megatron.bridge.plot", description=__doc__.splitlines()[0])
    parser.add_argument("metrics", type=expand_home, nargs="+", help="metrics.jsonl of a run, or of several")
    parser.add_argument("--output", type=expand_home, default="loss.png", help="the picture (default: loss.png)")
    parser.add_argument("--name", action="append", help="draw this instead of the losses, e.g. grad_norm")
    return parser


def main() -> None:
    """Parse and draw."""
    parser = build_parser()
    arguments = parser.parse_args()
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("matplotlib is not installed: pip install matplotlib")
    missing = [path for path in arguments.metrics if not Path(path).is_file()]
    if missing:
        parser.error(f"{missing[0]}: no such file; name the metrics.jsonl of a run")
    try:
        number = draw(arguments.metrics, arguments.output, wanted=arguments.name)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    print(f"{arguments.output}: {number} curves")


if __name__ == "__main__":
    exit_with(main)
