"""What `make deps` writes: a made-up project, its deps listed by hand."""

from textwrap import dedent

import pytest

from stages.lib.run import deps
from stages.lib.run.deps import code_of, with_code_deps

PIPELINE = """\
stages:
  # first of all
  cook:
    cmd: ${LAUNCH:-python} -m stages.cook   # by hand
    deps: [
      data/raw,
      stages/lib/gone.py,
      stages/cook.py]
    outs:
    - reports/cook/meal.csv: {cache: false}

  serve:
    cmd: python -m stages.serve
    deps: [
      reports/cook/meal.csv,   # still warm
      # on a plate
      stages/serve.py]
    params: [cook.salt,
      serve]
    outs:
    - reports/index.html
"""


@pytest.fixture
def root(tmp_path, monkeypatch):
    files = {
        "stages/cook.py": "import os\nfrom stages.lib.food import recipes\nfrom stages.lib.run.log import note\n",
        "stages/serve.py": "def main():\n    import stages.lib.table.plates as plates\n",
        "stages/lib/food/recipes.py": "from stages.lib.food.salt import pinch, stages\n",
        "stages/lib/food/salt.py": "import stages.lib.food.recipes\n",  # a circle
        "stages/lib/food/unused.py": "",
        "stages/lib/food/menu.jinja": "",  # nothing in this room renders templates
        "stages/lib/run/log.py": "from stages.lib.run.clock import now\n",
        "stages/lib/run/clock.py": "",
        "stages/lib/table/plates.py": "from jinja2 import Environment\n",
        "stages/lib/table/page.html.jinja": "",
        "stages/lib/table/card.md.jinja": "",
        "stages/lib/table/notes.txt": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(deps, "BOOKKEEPING", frozenset({"stages/lib/run/log.py"}))
    return tmp_path


def test_imports_are_followed_but_not_through_bookkeeping(root):
    assert code_of("cook", root) == ["stages/cook.py", "stages/lib/food/recipes.py", "stages/lib/food/salt.py"]


@pytest.mark.parametrize(
    "line", ["from jinja2 import Environment", "from stages.lib.run.templates import environment"]
)
def test_templates_come_with_the_module_that_renders_them(root, line):
    (root / "stages/lib/table/plates.py").write_text(f"{line}\n")
    assert code_of("serve", root) == [
        "stages/serve.py",
        "stages/lib/table/card.md.jinja",
        "stages/lib/table/page.html.jinja",
        "stages/lib/table/plates.py",
    ]


def test_only_code_deps_change(root):
    written = with_code_deps(PIPELINE, root)
    assert written == dedent("""\
        stages:
          # first of all
          cook:
            cmd: ${LAUNCH:-python} -m stages.cook   # by hand
            deps: [
              data/raw,
              stages/cook.py, stages/lib/food/recipes.py, stages/lib/food/salt.py]
            outs:
            - reports/cook/meal.csv: {cache: false}

          serve:
            cmd: python -m stages.serve
            deps: [
              reports/cook/meal.csv,   # still warm
              # on a plate
              stages/serve.py, stages/lib/table/card.md.jinja, stages/lib/table/page.html.jinja,
              stages/lib/table/plates.py]
            params: [cook.salt,
              serve]
            outs:
            - reports/index.html
        """)
    assert with_code_deps(written, root) == written
