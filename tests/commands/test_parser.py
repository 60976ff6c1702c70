"""What the command line knows before a command runs: which ones there are, what a mistyped one was meant to be."""

import subprocess
import sys
from pathlib import Path

import pytest

from inward import commands
from inward.__main__ import main
from inward.commands import COMMANDS
from inward.commands.parser import command_line

FOLDER = Path(commands.__file__).parent
HEAVY = {"torch", "transformers", "sklearn", "scipy", "numpy", "pydantic", "fastapi", "redis", "inward.settings"}
LONGEST_COMMAND = 80


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert len(capsys.readouterr().out) > 200


def test_every_module_is_a_command_and_every_command_a_module():
    modules = {file.stem.replace("_", "-") for file in FOLDER.glob("*.py")} - {
        "--init--",
        "parser",
        "options",
        "in-process",
    }
    assert modules == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_parses_and_calls_and_does_no_more(name):
    assert len((FOLDER / f"{name.replace('-', '_')}.py").read_text().splitlines()) <= LONGEST_COMMAND


def test_the_list_of_commands_says_what_each_is_for(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = " ".join(capsys.readouterr().out.split())
    assert all(f"{name} {purpose}" in listed for name, purpose in COMMANDS.items())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["srve"], "there is no command 'srve'; did you mean serve?"),
        (["qqq"], "there is no command 'qqq'; --help lists those that there are"),
        (["serve", "--prot", "80"], "there is no option --prot; did you mean --port?"),
        (["serve", "--qqqq=1"], "there is no option --qqqq; --help lists those that there are"),
        (["heads", "list", "--jsn"], "there is no option --jsn; did you mean --json?"),
        ([], "COMMAND"),
    ],
)
def test_a_mistyped_word_gets_a_suggestion(words, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["srve"]], ids=lambda words: words[0])
def test_what_needs_no_command_imports_none(words):
    code = (
        "import sys; from inward.__main__ import main\n"
        "try: main(sys.argv[1:])\n"
        f"except SystemExit: print('loaded:', *sorted({HEAVY!r} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].strip() == "loaded:"


@pytest.mark.parametrize(
    ("missing", "extra"), [("torch", "standard"), ("sklearn.svm", "standard"), ("ray", "ray"), ("shtab", "completion")]
)
def test_a_package_that_is_not_installed_is_named_with_what_brings_it(missing, extra, monkeypatch, capsys):
    def run(args):
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setattr("inward.commands.info.run", run)
    assert main(["info"]) == 2
    said = capsys.readouterr().err
    assert f"inward info: {missing.partition('.')[0]} is not installed" in said
    assert f"inward[{extra}]" in said


def test_a_module_of_ours_that_is_not_there_is_a_defect(monkeypatch):
    def run(args):
        raise ModuleNotFoundError("No module named 'inward.gone'", name="inward.gone")

    monkeypatch.setattr("inward.commands.info.run", run)
    with pytest.raises(ModuleNotFoundError):
        main(["info"])


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("both", [False, True])
def test_whose_reader_left_ends_without_a_word(unbuffered, both, monkeypatch):
    """As before ``| head``: with the status that a shell has for SIGPIPE."""
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    code = "import sys; from inward.__main__ import main; sys.stdin.read(); sys.exit(main(['info', '--model', 'toy']))"
    errors = subprocess.STDOUT if both else subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
    ) as process:
        process.stdout.close()
        process.stdin.close()
        said = b"" if both else process.stderr.read()
    assert (process.returncode, said) == (141, b"")


def test_another_pipe_that_broke_is_a_defect(monkeypatch):
    def run(args):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("inward.commands.info.run", run)
    with pytest.raises(BrokenPipeError):
        main(["info"])


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_a_shell_completes_commands_and_options(shell, capsys):
    pytest.importorskip("shtab", reason="shtab is not installed: pip install shtab")
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in COMMANDS)
    assert "redis-url" in script


def test_every_part_of_the_command_line_can_be_had_at_once():
    assert set(command_line().parse_args(["info"]).__dict__) == {"command", "run", "json"}
