"""The options that commands share, and how their text is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

Model = Annotated[str, typer.Argument(help="Folder or hub id of a causal language model.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="auto (float32 on a CPU, else the model's own), float32, bfloat16, float16.")]
Mixer = Annotated[str, typer.Option(help="What replaces the attention; see `fs.mixers.MIXERS`.")]
Options = Annotated[str, typer.Option(help="Options of the mixer as JSON, such as '{\"window\": 256}'.")]
Keep = Annotated[str, typer.Option(help='Layers that stay: a fraction ("1/4"), numbers ("0,7"), or 0.')]
Local = Annotated[bool, typer.Option("--local", help="Also swap layers that are windowed already.")]
Data = Annotated[str, typer.Option(help='"stdlib", a text file or folder, or a dataset id (name[:config[:field]]).')]
Prompt = Annotated[str, typer.Option(help="Text to continue.")]
Seed = Annotated[int, typer.Option(help="Random seed.")]
Compile = Annotated[bool, typer.Option("--compile/--no-compile", help="Generate with `fs.compile` as well.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the interrupted run in the folder.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what the folder holds.")]
PlanFile = Annotated[Path | None, typer.Option("--plan", help="Swap by this plan (of `fla-swap plan --out`).")]
Html = Annotated[Path | None, typer.Option("--html", help="Write the report to this file, as one HTML page.")]
Explain = Annotated[str | None, typer.Option("--explain", help="Say all that is known about this module.")]


def read_options(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"--options is not JSON ({error}): {text}") from error
    if not isinstance(options, dict):
        raise typer.BadParameter(f"--options must be a JSON object, got {text}")
    return options


def read_keep(text: str) -> Any:
    """ "1/4" and "0" as they are; "0,7" as layer numbers."""
    if "," not in text:
        return 0 if text == "0" else text
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise typer.BadParameter(f"--keep takes a fraction, layer numbers such as 0,7, or 0; got {text!r}") from error
