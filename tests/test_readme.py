"""The documentation is right: its examples run, its commands parse, and the files that it names exist."""

from __future__ import annotations

import argparse
import doctest
import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
from PIL import Image
from programs import MODEL_KWARGS, NAME, PROGRAMS, ROOT, Road

import supernet
from main_arguments import parse_main_arguments
from utils import UserError

README = (ROOT / "README.md").read_text()
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"))}
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
# Words that readers did not understand, and paths of one machine.
FORBIDDEN = (
    *("PROXIES", "asked for", "hangs on", "at hand", "a second", "dims a head", "plainly"),
    *("/root/", "/tmp/", "/work/", "/home/"),
)
WRITTEN_BY_THE_PROGRAMS = {"model.py"}
FLAGS = {"SIZES", "SIZE", "EXTRA", "PREPROCESSING", "WEIGHTS"}  # variables of the scripts that hold flags of main.py


# ---------------------------------------------------------------------------------------------------------------------
# The examples in Python


def test_the_example_is_the_doctest_of_supernet_and_runs(road: Road, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It runs in a folder where the demo would have left a network: here lies a smaller one."""
    (test,) = doctest.DocTestFinder(recurse=False).find(supernet, globs={})
    shown = [line for line in EXAMPLES[0].splitlines() if line]
    assert shown == [example.source.rstrip() for example in test.examples]
    (tmp_path / "output/demo/peelable").mkdir(parents=True)
    (tmp_path / "output/demo/peelable/digits").symlink_to(road.peelable)
    Image.new("RGB", (40, 30), (200, 100, 50)).save(tmp_path / "digit.png")
    monkeypatch.chdir(tmp_path)
    report = []
    result = doctest.DocTestRunner(verbose=False).run(test, out=report.append)
    assert result.failed == 0 and result.attempted == len(test.examples), "".join(report)
    assert supernet.load("output/cut").grade == "cut"


def test_the_example_of_contraction_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With a folder of photos, and a small random model instead of the pre-trained one."""
    create_model = timm.create_model

    def small_instead(name: str, **kwargs: object):
        if kwargs.pop("pretrained", False):
            return create_model(NAME, **MODEL_KWARGS | {"num_classes": 10})
        return create_model(name, **kwargs)

    (tmp_path / "photos/summer").mkdir(parents=True)
    for index in range(16):
        Image.effect_noise((40, 30), 50).save(tmp_path / f"photos/summer/{index}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timm, "create_model", small_instead)
    found: dict[str, object] = {}
    exec(EXAMPLES[1], found)
    assert found["net"].grade == "compensated" and len(found["net"].table) > 1
    assert isinstance(found["small"], timm.models.VisionTransformer)


# ---------------------------------------------------------------------------------------------------------------------
# Pages, files, words


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES)
def test_the_words_of_a_page(page: str):
    assert [word for word in FORBIDDEN if word in PAGES[page]] == []


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str):
    """Files beside the page, and headings under the name that GitHub gives them."""
    links = re.findall(r"\]\(([^)\s]+)\)", PAGES[page])
    for link in links:
        name, _, heading = link.partition("#")
        target = ((ROOT / page).parent / name if name else ROOT / page).resolve()
        assert target.exists(), link
        if heading:
            assert heading in anchors(target.read_text()), link
    assert page != "README.md" or {*PAGES} - {page} == {link.partition("#")[0] for link in links if ".md" in link}


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page: str):
    text = PAGES[page]
    names = set(re.findall(r"(?<![\w./-])(?:[\w-]+/)*[\w-]+\.(?:py|sh)\b|requirements[\w-]*\.txt|\bLICENSE\b", text))
    folders = "|".join(path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "output")
    names |= set(re.findall(rf"(?<![\w./-])(?:{folders})/[\w./-]*\w", text))
    missing = [name for name in names - WRITTEN_BY_THE_PROGRAMS if not (ROOT / name).exists()]
    assert missing == []


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def test_commands_parse(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Every command of every page: scripts know the variables that are set, and programs know the flags."""
    programs: set[str] = set()
    for page, text in PAGES.items():
        for words in commands(text):
            problem = problem_of(words, monkeypatch)
            assert problem is None, f"{page}: {shlex.join(words)}: {problem} {capsys.readouterr().err}"
            programs |= {word for word in words if re.fullmatch(r"[\w.]+", word)}
    scripts = {path.name for path in ROOT.glob("run_*.sh")}
    assert programs >= scripts | {"main.py", "reparam.py", "export.py", "studies.regimes", "report.page"}


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a page, in words, after any assignments to variables of the environment.

    Those of indented blocks, with their shell variables filled in, and those in a line of text.
    """
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    indented = r"(?m)(?:^ {4}.*\n)+"
    pieces = [re.sub(r"\\\n\s*", " ", re.sub(r"(?m)(^|\s)#.*$", "", block)) for block in re.findall(indented, text)]
    for code in re.findall(r"`([^`]+)`", re.sub(indented, "", text)):
        code = " ".join(code.split())
        if code.startswith("python ") or "sh run_" in code:
            pieces.append(code)
        elif code.startswith(tuple(f"{program} " for program in PROGRAMS)):
            pieces.append(f"python {code}")
    variables: dict[str, str] = {}
    for piece in pieces:
        for words in statements(piece):
            if all(re.match(r"\w+=", word) for word in words):
                for name, value in (word.split("=", 1) for word in words):
                    variables[name] = re.sub(r"\$(\w+)", lambda use: variables.get(use[1], use[0]), value)
            elif {"sh", "python", "export"} & {*words}:
                yield [part for word in words for part in filled(word, variables)]


def statements(block: str) -> Iterator[list[str]]:
    """The words of each statement; none of a block that is not of the shell."""
    lexer = shlex.shlex(block, posix=True, punctuation_chars=";&|\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
    words: list[str] = []
    try:
        for word in [*lexer, ";"]:
            if set(word) <= set(";&|\n"):
                yield words
                words = []
            else:
                words.append(word)
    except ValueError:  # a quotation mark without its partner
        return


def filled(word: str, variables: dict[str, str]) -> list[str]:
    """A word as the shell passes it: a variable alone gives the words that it holds."""
    return variables[word[1:]].split() if word.startswith("$") and word[1:] in variables else [word]


class ParsedError(Exception):
    """Raised once a program has parsed its arguments, so that it does not start its work."""


def problem_of(words: list[str], monkeypatch: pytest.MonkeyPatch) -> str | None:
    """Why a command would be refused, or None."""
    assignments = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
    script = next((word for word in words if re.fullmatch(r"run_\w+\.sh", word)), None)
    if script:
        text = (ROOT / script).read_text() + (ROOT / "common.sh").read_text()
        for name, value in assignments.items():
            if not re.search(rf"\b{name}\b", text):
                return f"{script} has no {name}"
            if name in FLAGS and "reparam" not in script:
                stage = re.search(r"--stage (\w+)", (ROOT / script).read_text())
                problem = refused("main.py", ["--stage", stage[1] if stage else "piad", *value.split()], monkeypatch)
                if problem:
                    return problem
        return None
    if "python" not in words:
        return None
    program, *arguments = words[words.index("python") + 1 :]
    if program == "-m":
        program, *arguments = arguments
    return None if program == "pip" else refused(program, arguments, monkeypatch)


def refused(program: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> str | None:
    """Calls main() of a program as far as the end of parsing its arguments."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self: argparse.ArgumentParser, *args: object, **kwargs: object):
        parse(self, *args, **kwargs)
        raise ParsedError

    name = program.removesuffix(".py") if program.endswith(".py") else program
    if not (ROOT / f"{name.replace('.', '/')}.py").is_file():
        return f"{program} does not exist"
    with monkeypatch.context() as patched:
        patched.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        patched.setattr(sys, "argv", [program, *arguments])
        try:
            importlib.import_module(name).main()
        except ParsedError:
            pass
        except (SystemExit, UserError) as error:
            if getattr(error, "code", 1) != 0:  # --help ends with 0
                return f"refused ({error})"
        if "--" in arguments and program.startswith("studies."):
            patched.setattr(sys, "argv", ["main.py", *arguments[arguments.index("--") + 1 :]])
            try:
                parse_main_arguments()
            except ParsedError:
                pass
            except SystemExit as error:
                return f"the flags for main.py are refused ({error})"
    return None
