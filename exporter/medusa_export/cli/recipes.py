"""`medusa-export recipes`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from medusa_export.cli.commands import Group
from medusa_export.cli.json_options import json_option
from medusa_export.cli.shared_options import threads_option, trust_remote_code_option
from medusa_export.recipe.schema import STEPS

step_type = click.Choice(STEPS)
recipe_argument = click.argument("recipe", metavar="NAME_OR_PATH")


@click.group("recipes", cls=Group)
def command() -> None:
    """Run all steps for a model with one command: fetch, distill, train, onnx, validate."""


@command.command("ls")
@json_option
def ls(*, as_json: bool) -> None:
    """List the recipes that come with the package."""
    from rich.table import Column, Table

    from medusa_export.console import Console
    from medusa_export.recipe import library
    from medusa_export.recipe.schema import outline
    from medusa_runtime.bundle.files import json_text

    found = [outline(library.text_of(path), library.shown(path)) for path in library.shipped()]
    if as_json:
        facts = [{name: getattr(recipe, name) for name in ("name", "description", "model", "method")} for recipe in found]
        click.echo(json_text({"recipes": facts}, indent=1))
        return
    table = Table(
        Column("name", no_wrap=True), "description", Column("model", no_wrap=True), "method", box=None, pad_edge=False
    )
    for recipe in found:
        table.add_row(recipe.name, recipe.description, recipe.model, recipe.method or "-")
    Console(highlight=False, width=None if sys.stdout.isatty() else 256).print(table)  # a pipe has no width: do not wrap


@command.command("show")
@recipe_argument
@click.option("--resolved", is_flag=True, help="Print every field, including defaults.")
def show(recipe: str, *, resolved: bool) -> None:
    """Print a recipe."""
    from medusa_export.recipe import library

    path = library.find(recipe)
    click.echo(library.load(path).to_yaml() if resolved else library.text_of(path), nl=False)


@command.command("cp")
@recipe_argument
@click.argument("destination", type=click.Path(path_type=Path))
def cp(recipe: str, destination: Path) -> None:
    """Copy a recipe to DESTINATION, a new file or a directory, so that you can edit it."""
    from medusa_export.recipe import library
    from medusa_runtime.errors import OptionError

    path = library.find(recipe)
    target = destination / path.name if destination.is_dir() else destination
    text = library.text_of(path)
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise OptionError(f"{target} exists; choose another destination") from error
    click.echo(target)


@command.command("validate")
@click.argument("recipes", metavar="[NAME_OR_PATH]...", nargs=-1)
@json_option
def validate(recipes: tuple[str, ...], *, as_json: bool) -> None:
    """Check recipes, by default all that come with the package. Exit code 2 if one is wrong."""
    from medusa_export.recipe import library
    from medusa_export.recipe.schema import RecipeError
    from medusa_runtime.bundle.files import json_text
    from medusa_runtime.errors import MedusaError

    found: dict[str, list[str]] = {}
    for path in [library.find(recipe) for recipe in recipes] or library.shipped():
        try:
            library.load(path)
        except MedusaError as error:
            found[library.shown(path)] = lines = error.lines if isinstance(error, RecipeError) else [str(error)]
            for line in lines:
                click.echo(f"Error: {line}", err=True)
        else:
            found[library.shown(path)] = []
            if not as_json:
                click.echo(f"{library.shown(path)}: ok")
    if as_json:
        click.echo(json_text({"errors": found}, indent=1))
    if any(found.values()):
        raise click.exceptions.Exit(2)


@command.command("run")
@recipe_argument
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Directory for all results. [default: the recipe's own]")
@click.option(
    "--set", "overrides", multiple=True, metavar="SECTION.FIELD=VALUE", help="Override the value of a field of the recipe."
)
@click.option("--only", type=step_type, help="Run only this step.")
@click.option("--from", "first", type=step_type, help="Run this step and those after it.")
@click.option("--to", "last", type=step_type, help="Run this step and those before it.")
@click.option("--force", is_flag=True, help="Repeat steps that are already done. Distilled answers are kept.")
@click.option("--device", help="auto, cpu, cuda, cuda:1 … [default: auto]")
@threads_option
@trust_remote_code_option
def run(
    recipe: str,
    output: Path | None,
    overrides: tuple[str, ...],
    only: str | None,
    first: str | None,
    last: str | None,
    device: str | None,
    threads: int,
    *,
    force: bool,
    trust_remote_code: bool,
) -> None:
    """Run a recipe's steps: fetch, distill, train, onnx, validate.

    A step that is done is repeated only if its settings or its inputs have changed. Run the same command again to continue an
    interrupted run. Exit code 3 if the bundle's output differs from PyTorch's.
    """
    from medusa_export.recipe import library

    if only and (first or last):
        raise click.UsageError("--only cannot be combined with --from or --to")
    path = library.find(recipe)
    parsed = library.load(path, overrides)

    from medusa_export.recipe.run_recipe import Choice, run_recipe
    from medusa_export.recipe.steps import Job

    job = Job(parsed, path.parent, output or parsed.output, device, threads, trust_remote_code)
    click.echo(run_recipe(job, Choice(only or first, only or last, force)))
