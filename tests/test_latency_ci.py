"""docs/latency-ci.md and docs/ci/: workflows that users copy hold together, and name commands that exist."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from latencies import case, comparison, run

from edgekit.cli import app
from edgekit.latency_files import save

DOCS = Path(__file__).parents[1] / "docs"
WORKFLOWS = sorted((DOCS / "ci").glob("*.yml"))
GUIDE = (DOCS / "latency-ci.md").read_text(encoding="utf-8")
LATENCY = DOCS / "latency.md"
FILES = [*WORKFLOWS, DOCS / "latency-ci.md", LATENCY]


def texts(value: Any) -> Iterator[str]:
    """Every string in a YAML document."""
    if isinstance(value, dict):
        for inner in value.values():
            yield from texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from texts(inner)
    elif isinstance(value, str):
        yield value


def scripts(path: Path) -> Iterator[str]:
    """What a shell would run: all strings of a workflow; of a guide, its blocks and what is between backticks."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".yml":
        yield from texts(yaml.safe_load(text))
        return
    yield from re.findall(r"^ *```(?:sh|groovy)\n(.*?)```", text, re.MULTILINE | re.DOTALL)
    yield from re.findall(r"`(edgekit [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def commands(path: Path) -> list[list[str]]:
    """The words after `edgekit` of each command line in a file."""
    found = []
    for script in scripts(path):
        for line in script.replace("\\\n", " ").splitlines():
            start = re.search(r"(?:^|[;&|({'] *|sh ')\s*(?:uv run )?edgekit (.+)", line)
            if start:
                words = start.group(1).rstrip("'").split(" #")[0]
                found.append(shlex.split(re.sub(r"\$\{?\w+\}?", "X", words)))
    return found


COMMANDS = [pytest.param(words, id=f"{path.name}: {' '.join(words)}") for path in FILES for words in commands(path)]


@pytest.mark.parametrize("words", COMMANDS)
def test_each_command_is_one_with_its_options(words: list[str]) -> None:
    parse(words)


def parse(words: list[str]) -> None:
    """As the command line does it. Raises UsageError for an unknown command or option, and what is missing."""
    group = typer.main.get_command(app)
    context = group.make_context("edgekit", list(words), resilient_parsing=True)
    context.resilient_parsing = False
    name, command, rest = group.resolve_command(context, list(words))  # type: ignore[attr-defined]
    if rest:  # else it is named, and not shown as it is run
        command.make_context(name, list(rest))


def test_the_commands_are_found() -> None:
    """Else the test above would have nothing to say."""
    for path in FILES:
        assert commands(path), path
    for path in WORKFLOWS:
        assert {words[0] for words in commands(path)} == {"bundle", "compare"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["measure", "a"], "No such command"),
        (["compare", "a", "b", "--fail-when", "5%"], "--fail-when"),
        (["compare", "a", "--save", "x"], "CANDIDATE"),
        (["bench", "a", "--seconds", "long"], "--seconds"),
    ],
)
def test_a_wrong_command_would_be_found(words: list[str], message: str) -> None:
    with pytest.raises(Exception) as caught:
        parse(words)
    assert type(caught.value).__module__.endswith("exceptions") and message in caught.value.format_message()  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_scripts_are_such(path: Path) -> None:
    if not shutil.which("bash"):
        pytest.skip("there is no bash")
    document = yaml.safe_load(path.read_text("utf-8"))
    jobs = [job for job in (document.get("jobs") or document).values() if isinstance(job, dict)]
    lines = [line for job in jobs for key in ("before_script", "script") for line in job.get(key, ())]
    lines += [step["run"] for job in jobs for step in job.get("steps", ()) if "run" in step]
    assert len(lines) >= 4
    for line in lines:
        checked = subprocess.run(["bash", "-n", "-c", line], capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stderr


def test_both_workflows_judge_alike() -> None:
    """The same limit, a FAIL confirmed, the files in a folder that the rest of the workflow takes."""
    for path in WORKFLOWS:
        (words,) = [words for words in commands(path) if words[0] == "compare"]
        assert words[words.index("--fail-if") + 1] == "5%" and "--confirm" in words
        assert words[words.index("--save") + 1] == "latency"


def saved_names(tmp_path: Path) -> set[str]:
    save(comparison(case()), tmp_path)
    return {path.name for path in tmp_path.iterdir()}


def test_files_that_are_named_are_files_that_are_written(tmp_path: Path) -> None:
    names = saved_names(tmp_path)
    for path in (*WORKFLOWS, DOCS / "latency-ci.md"):
        named = set(re.findall(r"\blatency/([\w.-]+\.\w+)", path.read_text(encoding="utf-8")))
        assert named and named <= names
    table = set(re.findall(r"^\| `([\w.-]+)` \|", GUIDE, re.MULTILINE))
    assert table == names >= {path.name for path in save(run(), tmp_path)}


def test_exit_codes_are_the_commands_own() -> None:
    help_text = typer.main.get_command(app).commands["compare"].help  # type: ignore[attr-defined]
    codes = re.findall(r"^\| (\d) \|", GUIDE, re.MULTILINE)
    assert codes == re.findall(r"\b(\d) \w+", help_text.split("Exit codes:")[1]) == ["0", "1", "2", "3", "4"]


def test_github_actions() -> None:
    workflow = yaml.safe_load((DOCS / "ci" / "github-actions.yml").read_text("utf-8"))
    assert workflow[True] == {"pull_request": None, "push": {"branches": ["main"]}}  # YAML 1.1 reads `on` as true
    compare, keep = workflow["jobs"]["compare"], workflow["jobs"]["keep"]
    assert compare["permissions"] == {"contents": "read", "pull-requests": "write"}, (
        "a pull request's code writes nothing"
    )
    assert keep["permissions"] == {"contents": "write"} and keep["if"] == "github.event_name == 'push'"
    steps = {step.get("name", step.get("uses", step.get("run"))): step for step in compare["steps"]}
    assert steps["Did it get slower?"]["if"] == "steps.baseline.outputs.found == 'true'"
    for name in ("Job summary", "Comment, one a pull request", "Every sample, the picture, the JUnit report"):
        assert "!cancelled()" in steps[name]["if"], "what failed is shown too"
    for job in (compare, keep):
        assert [step["run"] for step in job["steps"] if "edgekit bundle" in step.get("run", "")] == [
            'edgekit bundle "$RUN" --target "$TARGET"'
        ]


def test_gitlab_ci() -> None:
    pipeline = yaml.safe_load((DOCS / "ci" / "gitlab-ci.yml").read_text("utf-8"))
    job = pipeline["latency"]
    assert job["artifacts"]["reports"] == {"junit": "latency/junit.xml"} and job["artifacts"]["when"] == "always"
    assert job["artifacts"]["paths"] == ["latency/"]
    assert job["allow_failure"] == {"exit_codes": 3} and "--strict" in job["script"][-1]
    assert job["rules"] == [{"if": '$CI_PIPELINE_SOURCE == "merge_request_event"'}]
    assert pipeline["latency-baseline"]["rules"] == [{"if": "$CI_COMMIT_BRANCH == $CI_DEFAULT_BRANCH"}]
    assert all(isinstance(line, str) for name in ("latency", "latency-baseline") for line in pipeline[name]["script"])


def test_links_of_the_guide_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", GUIDE):
        assert (DOCS / link).is_file(), link


def test_yaml_in_the_guide_is_yaml() -> None:
    blocks = re.findall(r"^```yaml\n(.*?)```", GUIDE, re.MULTILINE | re.DOTALL)
    assert [yaml.safe_load(block)[0]["with"]["output-file-path"] for block in blocks] == [
        "latency/github-action-benchmark.json"
    ]
