"""`fla-swap …`: every stage of the library as a command. Tables for people, `--json` for programs.

Each command takes a folder or a hub id. An error that fla_swap raises on purpose is one line and exit status 1.
"""

from __future__ import annotations

import json
import sys
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from fla_swap.bench.commands import bench
from fla_swap.consoles import err, log_to_console, out, progress_bar, resumable, show
from fla_swap.errors import CheckpointError, FlaSwapError
from fla_swap.options import (
    Compile,
    Data,
    Device,
    Dtype,
    Explain,
    Html,
    Json,
    Keep,
    Local,
    Mixer,
    Model,
    Options,
    Overwrite,
    PlanFile,
    Prompt,
    Resume,
    Seed,
    read_keep,
    read_options,
)
from fla_swap.serving.command import serve_command

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Find a Transformer's attention, prove it, swap it, distil it, compile it, run it.",
)
app.add_typer(bench, name="bench")
app.command("serve")(serve_command)
TEACHER = Path(__file__).resolve().parent.parent / "examples" / "teacher"
PROMPT = 'def read_config(path, encoding=\'utf-8\'):\n    """Read'


@app.command("inspect")
def inspect_command(
    model: Model,
    html: Html = None,
    explain: Explain = None,
    as_json: Json = False,
) -> None:
    """Find every attention layer and prove each one; say what was not understood, and why."""
    from fla_swap.checkpoint import load
    from fla_swap.errors import NoAttentionFound
    from fla_swap.inspection import inspect

    try:
        show_report(inspect(load(model)), html, explain, as_json)
    except NoAttentionFound as error:
        if error.report is not None:
            show_report(error.report, html, explain, as_json)
        raise


def show_report(report: Any, html: Path | None, explain: str | None, as_json: bool) -> None:
    """As tables, as JSON, or what it says about one module; and as a page in the file `html`."""
    from fla_swap.errors import ConfigError
    from fla_swap.reporting import report_html, report_table

    if html is not None:
        html.write_text(report_html(report), encoding="utf-8")
    if explain is None:
        show(report_table(report), report.to_dict(), as_json)
        return
    try:
        text = report.explain(explain)
    except KeyError as error:
        raise ConfigError(f"--explain: {error.args[0]}") from error
    out.print(text, markup=False, highlight=False, soft_wrap=True)


@app.command("plan")
def plan_command(
    model: Model,
    mixer: Mixer = "gated_deltanet",
    options: Options = "{}",
    keep: Keep = "1/4",
    local: Local = False,
    save_to: Annotated[Path | None, typer.Option("--out", help="Write the plan to this JSON file.")] = None,
    as_json: Json = False,
) -> None:
    """Choose which layers are swapped, and for what."""
    from fla_swap.checkpoint import load
    from fla_swap.inspection import inspect
    from fla_swap.planning import plan, plan_table, save_plan
    from fla_swap.types import to_jsonable

    chosen = plan(inspect(load(model)), mixer=mixer, options=read_options(options), keep=read_keep(keep), local=local)
    if save_to is not None:
        save_plan(chosen, save_to)
    show(plan_table(chosen), to_jsonable(chosen), as_json)


@app.command("convert")
def convert_command(
    context: typer.Context,
    model: Model,
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for the converted model and the report.")],
    data: Data,
    mixer: Mixer = "gated_deltanet",
    options: Options = "{}",
    keep: Keep = "1/4",
    local: Local = False,
    plan_file: PlanFile = None,
    minutes: Annotated[float, typer.Option(help="Minutes of training.")] = 10.0,
    start: Annotated[str, typer.Option(help="calibrated or naive.")] = "calibrated",
    select: Annotated[str, typer.Option(help="How a fraction is kept: greedy, leave_one_out or uniform.")] = "greedy",
    block_size: Annotated[int | None, typer.Option(help="Tokens a training sequence.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences a step.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Read no more training text than this.")] = 50_000_000,
    eval_tokens: Annotated[int, typer.Option(help="Held-out tokens to measure.")] = 32_768,
    prompt: Prompt = "",
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    compiled: Compile = True,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Swap, distil, save and check: a pretrained model becomes a hybrid."""
    from fla_swap.conversion import PLANNING, ConvertConfig

    if plan_file is not None:
        given = [n for n in PLANNING if getattr(context.get_parameter_source(n), "name", "") == "COMMANDLINE"]
        if given:
            raise typer.BadParameter(f"--plan says what is swapped already: leave out --{', --'.join(given)}")
    config = ConvertConfig(
        mixer=mixer,
        options=read_options(options) or None,
        keep=read_keep(keep),
        local=local,
        plan=plan_file,
        data=data,
        minutes=minutes,
        start=start,
        select=select,
        block_size=block_size,
        batch_size=batch_size,
        max_tokens=max_tokens,
        eval_tokens=eval_tokens,
        prompt=prompt,
        device=device,
        dtype=dtype,
        seed=seed,
        compile=compiled,
    )
    run_conversion(model, out_dir, config, resume=resume, overwrite=overwrite, as_json=as_json)


@app.command("demo")
def demo_command(
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for the converted model and the report.")] = Path(
        "out/demo"
    ),
    model: Annotated[str, typer.Option(help="The model to convert.")] = str(TEACHER),
    data: Data = "stdlib",
    minutes: Annotated[float, typer.Option(help="Minutes of training.")] = 2.0,
    device: Device = "auto",
    seed: Seed = 0,
    compiled: Compile = True,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """The main job on the shipped teacher: Gated DeltaNet in three quarters of the layers, distilled and compiled."""
    from fla_swap.conversion import ConvertConfig
    from fla_swap.output import TRAINING, holds_conversion_of

    if model == str(TEACHER) and not TEACHER.exists():
        raise CheckpointError(f"the demo's teacher comes with the sources only, not here ({TEACHER}): pass --model")
    config = ConvertConfig(
        mixer="gated_deltanet",
        keep="1/4",
        data=data,
        minutes=minutes,
        device=device,
        prompt=PROMPT,
        seed=seed,
        compile=compiled,
    )
    if resume or not (out_dir / TRAINING).exists():  # an earlier demo makes room for the next, an interrupted one not
        overwrite = overwrite or holds_conversion_of(model, out_dir)
    run_conversion(model, out_dir, config, resume=resume, overwrite=overwrite, as_json=False)


@app.command("distill")
def distill_command(
    model: Annotated[str, typer.Argument(help="A converted model.", show_default=False)],
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for the further trained model.")],
    teacher: Annotated[str, typer.Option(help="The original model: folder or hub id.")],
    data: Data,
    minutes: Annotated[float, typer.Option(help="Minutes of training.")] = 10.0,
    block_size: Annotated[int, typer.Option(help="Tokens a training sequence.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Sequences a step.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="Of the mixers.")] = 1e-3,
    rest_learning_rate: Annotated[float, typer.Option(help="Of everything else.")] = 1e-4,
    max_tokens: Annotated[int, typer.Option(help="Read no more training text than this.")] = 50_000_000,
    device: Device = "auto",
    seed: Seed = 0,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Train a converted model further, by KL against its original (long context: a larger --block-size)."""
    from fla_swap.checkpoint import load, save
    from fla_swap.conversion import check_vocabulary, find_device, load_tokenizer
    from fla_swap.distillation import DistillConfig, StageConfig, distill
    from fla_swap.distillation.data import load_blocks
    from fla_swap.output import TRAINING, check_output, clear_training, make_room

    check_output(out_dir, resume=resume, overwrite=overwrite)
    find_device(device)
    stage = StageConfig(
        kind="distil",
        minutes=minutes,
        batch_size=batch_size,
        train="all",
        learning_rate=learning_rate,
        rest_learning_rate=rest_learning_rate,
    )
    config = DistillConfig(
        calibrate=None,
        stages=(stage,),
        output_dir=out_dir / TRAINING,
        resume=resume,
        seed=seed,
        device=device,
    )
    student, tokenizer = load(model), load_tokenizer(model)
    blocks = load_blocks(data, tokenizer, block_size, split="train", limit_tokens=max_tokens).blocks
    check_vocabulary(student, tokenizer, blocks, model)
    original = load(teacher)
    make_room(out_dir, student, resume=resume, overwrite=overwrite)
    with resumable(out_dir), closing(progress_bar()) as bar:
        result = distill(student, blocks, config, teacher=original, progress=bar)
    save(student, out_dir, tokenizer=tokenizer, overwrite=overwrite)
    clear_training(out_dir)
    err.print(f"{result.tokens:,} tokens; saved to {out_dir}")


@app.command("generate")
def generate_command(
    model: Model,
    prompt: Prompt = PROMPT,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling.")] = 1.0,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Run it through fs.compile.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
) -> None:
    """Continue a prompt, token by token as they come."""
    import torch
    from transformers import TextStreamer

    from fla_swap.checkpoint import load
    from fla_swap.compilation import compile as compile_model
    from fla_swap.conversion import find_device, load_tokenizer, pick_dtype

    where = find_device(device)
    loaded: Any = load(model, dtype=pick_dtype(dtype, where), device=where).eval()
    tokenizer = load_tokenizer(model)
    torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(where)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
    runner: Any = compile_model(loaded) if compiled else loaded
    runner.generate(**inputs, max_new_tokens=new_tokens, streamer=TextStreamer(tokenizer), **sampling)


@app.command("package")
def package_command(
    model: Model,
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for the two libraries, the weights and package.json.")],
    rows: Annotated[int, typer.Option(help="Prompts that are generated at the same time.")] = 1,
    context: Annotated[int, typer.Option(help="Longest prompt and answer together, in tokens.")] = 2048,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Compile prefill and decode into a folder that runs without transformers (`fs.load_package`)."""
    from fla_swap.checkpoint import load
    from fla_swap.conversion import find_device, pick_dtype
    from fla_swap.packaging import package

    where = find_device(device)
    loaded: Any = load(model, dtype=pick_dtype(dtype, where), device=where)
    with err.status("compiling prefill and decode (a minute or more)"):
        package(loaded, out_dir, rows=rows, context=context)
    out.print(f'{out_dir}: fs.load_package("{out_dir}").generate(ids)', markup=False, highlight=False)


@app.command("eval")
def eval_command(
    models: Annotated[list[str], typer.Argument(help="Models to compare; the first is the reference.")],
    data: Data = "stdlib",
    block_size: Annotated[int, typer.Option(help="Tokens a sequence.")] = 512,
    eval_tokens: Annotated[int, typer.Option(help="Held-out tokens to measure.")] = 65_536,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Held-out loss (nats a token) and perplexity of one or several models on the same text."""
    from fla_swap.conversion import held_out_of
    from fla_swap.distillation import perplexity

    losses = {name: held_out_of(name, data, block_size, eval_tokens, device, dtype) for name in models}
    table = Table("model", "loss", "perplexity", "Δ loss")
    for name, loss in losses.items():
        table.add_row(name, f"{loss:.4f}", f"{perplexity(loss):.3f}", f"{loss - losses[models[0]]:+.4f}")
    show(table, losses, as_json)


def run_conversion(model: str, folder: Path, config: Any, *, resume: bool, overwrite: bool, as_json: bool) -> None:
    from fla_swap.conversion import Listener, convert
    from fla_swap.planning import plan_table
    from fla_swap.plotting import LABELS
    from fla_swap.reporting import report_table

    with resumable(folder), closing(progress_bar()) as bar:
        listener = Listener(
            say=err.print,
            found=lambda report: err.print(report_table(report)),
            planned=lambda chosen: err.print(plan_table(chosen)),
            progress=bar,
        )
        facts = convert(model, folder, config, resume=resume, overwrite=overwrite, listener=listener)
    if as_json:
        sys.stdout.write(json.dumps(facts) + "\n")
        return
    table = Table("held-out text", "loss, nats a token", "perplexity", "Δ to teacher")
    for name, loss in facts["losses"].items():
        delta = loss - facts["losses"]["teacher"]
        table.add_row(LABELS.get(name, name), f"{loss:.4f}", f"{facts['perplexities'][name]:.3f}", f"{delta:+.4f}")
    out.print(table)
    for name, text in facts["texts"].items():
        if text:
            out.print(f"[bold]{name}[/bold]")
            out.print(text, markup=False, highlight=False)
    out.print(f"{facts['tokens']:,} training tokens; the reloaded model's logits are bitwise equal; see {folder}")


def main() -> None:
    """The console script: runs the app; our own errors, and files that cannot be used, are one line and status 1."""
    log_to_console()
    disable_progress_bar()
    try:
        app()
    except (FlaSwapError, OSError) as error:
        err.print(
            f"[bold red]error:[/bold red] {type(error).__name__}: {escape(str(error))}", highlight=False, soft_wrap=True
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
