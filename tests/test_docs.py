"""Facts in the pages that would go stale: the ops and their arguments, links, and the map of docs/."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad

import ling_kernels as lk
from ling_kernels import ops
from ling_kernels.backend import force
from tests.cases import DEVICE, runs

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "docs/integrations").glob("*.md")]


def without_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def anchor(heading: str) -> str:
    """The fragment of a heading's link, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_the_readme_names_every_op():
    table = (ROOT / "README.md").read_text().split("| part | ops |\n|---|---|\n")[1].split("\n\n")[0]
    assert sorted(re.findall(r"`(\w+)`", table)) == sorted(ops.EXPORTS)


def test_the_readmes_code_runs(capsys):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    seen = {}
    exec(code, seen)
    assert seen["y"].shape == (64, 256) and seen["counts"].sum() == 64 * 4
    assert "tensor(" in capsys.readouterr().out


def test_the_contracts_have_the_ops_and_their_arguments():
    """Rows of docs/ops.md begin with `op(arguments)`; three dots stand for any number of arguments."""
    rows = re.findall(r"^\| `(\w+)\((.*?)\)` \|", (ROOT / "docs/ops.md").read_text(), re.MULTILINE)
    functions = {*ops.EXPORTS, "dequantize", "swiglu_backward"}
    assert sorted(name for name, _ in rows) == sorted(functions)
    for name, arguments in rows:
        wanted = ", ".join(inspect.signature(getattr(lk, name)).parameters)
        pattern = re.escape(arguments).replace(re.escape("..."), ".*")
        assert re.fullmatch(pattern, wanted), f"{name}({wanted}) is {name}({arguments}) in docs/ops.md"


@pytest.mark.skipif(not runs("triton"), reason="triton cannot run here")
def test_torch_func_matches_its_contract():
    x = torch.randn(4, 64, device=DEVICE)
    with force("triton"), pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda x: lk.swiglu(x).sum())(x)
    with force("triton"), pytest.raises(RuntimeError, match="setup_context"):
        torch.func.vmap(lk.swiglu)(x)
    with force("triton"), forward_ad.dual_level(), pytest.raises(NotImplementedError):
        lk.swiglu(forward_ad.make_dual(x, x))
    with force("torch"):  # a reference of torch's own operators
        got = torch.func.grad(lambda x: lk.swiglu(x).sum())(x)
    torch.testing.assert_close(got, torch.autograd.grad(lk.swiglu(x.requires_grad_()).sum(), x)[0])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_tests_that_a_page_names_exist(page):
    for name in re.findall(r"\btests/[\w/]+\.\w+", page.read_text()):
        assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_the_tests_of_faults_exist():
    """Every row names a file, and tests that are in it; a name alone is in the file named before it."""
    for row in (ROOT / "docs/faults.md").read_text().split("|---|---|---|\n")[1].splitlines():
        names, file = re.findall(r"`(?:tests/([\w/]+)\.py::)?(test_\w+)`", row), ""
        assert names, row
        for module, test in names:
            file = module or file
            assert f"def {test}(" in (ROOT / "tests" / f"{file}.py").read_text(), f"{file} has no {test}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if "://" in target:
            continue
        name, _, fragment = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), f"{page.name} links to {target}"
        if fragment:
            headings = re.findall(r"^#+ (.+)$", without_code(file.read_text()), re.MULTILINE)
            assert fragment in map(anchor, headings), f"{page.name} links to {target}"


def test_the_map_has_every_page():
    linked = re.findall(r"\]\(([\w-]+\.md)\)", (ROOT / "docs/index.md").read_text())
    assert sorted(linked) == sorted(p.name for p in (ROOT / "docs").glob("*.md") if p.name != "index.md")


def test_the_list_of_integrations_has_every_page():
    linked = re.findall(r"\]\(integrations/([\w-]+\.md)\)", (ROOT / "docs/integrations.md").read_text())
    assert sorted(linked) == sorted(p.name for p in (ROOT / "docs/integrations").glob("*.md"))


def test_a_contributors_table_has_the_rooms_in_order():
    from tests.test_layers import ABOVE_ALL, LAYERS

    text = (ROOT / "docs/contributing.md").read_text()
    table = text.split("| rooms, lowest first | content |\n|---|---|\n")[1].split("\n\n")[0]
    rows = [re.findall(r"`(\w+)`", line.split("|")[1]) for line in table.splitlines()]
    assert rows == [*LAYERS, ["integrations"], ["recipes"], sorted(ABOVE_ALL, reverse=True)]
