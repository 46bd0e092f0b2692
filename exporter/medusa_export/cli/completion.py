"""`medusa-export completion`."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from medusa_export.cli.commands import Command

PROGRAM = "medusa-export"
VARIABLE = "_MEDUSA_EXPORT_COMPLETE"  # the shell's script sets it, and Click reads it


@click.command("completion", cls=Command)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    r"""Print the script that lets SHELL complete commands, options and their values.

    \b
    bash: eval "$(medusa-export completion bash)" in ~/.bashrc
    zsh:  eval "$(medusa-export completion zsh)" in ~/.zshrc
    fish: medusa-export completion fish > ~/.config/fish/completions/medusa-export.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None
    script = kind(ctx.find_root().command, {}, PROGRAM, VARIABLE)
    click.echo(script.source_template % script.source_vars())
