"""Pages of the documentation site that are not in docs/: the notebooks, the reference and the pages at the root.

mkdocs.yml names this file as its hooks. Notebooks are shown as they were saved, so nothing runs. A link that leaves
docs/ leads to the page that its file has on the site; a source file that a page links to gets a page too.
"""

from __future__ import annotations

import json
import posixpath
import re
from base64 import b64decode
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

import kt
from kt import errors
from kt.cli.app import COMMANDS, Commands, app

ROOT = Path(__file__).parents[2]
MOVED = {
    "README.md": "index.md",
    "docs/README.md": "pages.md",
    "notebooks": "tutorials/index.md",
    **{f"{name}.md": f"{name.lower()}.md" for name in ("ARCHITECTURE", "CHANGELOG", "CONTRIBUTING")},
    **{f"notebooks/{path.name}": f"tutorials/{path.stem}.md" for path in (ROOT / "notebooks").glob("*.ipynb")},
}
"""Files of the repository that are pages of the site, under another name than in docs/."""

REFERENCE = {
    "models": ("Models", "load Chat TracedModel Kind Site"),
    "facts": ("Facts", "load_facts read_facts iter_facts Fact Prompt"),
    "tracing": (
        "Tracing",
        "causal_trace Trace balance_factor Balance screen Screen peak_inflation knowledge_neurons find_layers",
    ),
    "probing": ("Probing", "contrast_probe Probe residual_fact Residual"),
    "editing": ("Editing", "edit Edit EditSession EditStack run_edits key_statistics train_editor Editor"),
    "judging": ("Judging", "evaluate Scores abilities Abilities case_study CaseStudy Sweep run_recipe explore widget"),
    "errors": ("Errors", "KtError"),
}
"""The pages of the reference: title, and the public names on each."""

KINDS = [name for name, thing in vars(errors).items() if isinstance(thing, type) and thing.__module__ == "kt.errors"]
ERRORS = """An error that a user can cause is a `KtError` with one line: what is wrong, where, and what to do instead.
`except kt.KtError` catches all of them. On the command line it stands on stderr; exit code 2 means that the input was
wrong, 1 that the work failed or a check did not hold. `KT_DEBUG=1` shows the traceback."""

EXAMPLES = """The examples on this page begin with:

```python
import kt

model, facts = kt.load("demo"), kt.load_facts("demo", limit=4)
edit = kt.edit(model, facts[:2], method="memit")
```"""
"""Above each page of the reference; tests/test_docstrings.py runs the examples so."""

NUMBER = r"[+−-]?\d[\d.,e+−-]*"
INTERVAL = re.compile(rf"(?<=>){NUMBER} (?:\[{NUMBER}, {NUMBER}\]|\({NUMBER} to {NUMBER}, n = \d+\))(?=[ <])")
"""A mean with its interval, alone in a cell."""

LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are not files of docs/."""
    files.remove(files.get_file_from_path("README.md"))
    pages: dict[str, str | bytes] = {}
    for source, target in MOVED.items():
        path = ROOT / source
        if path.suffix == ".ipynb":
            pages |= tutorial(path)
        elif path.suffix == ".md":
            pages[target] = path.read_text(encoding="utf-8")
    pages["tutorials/index.md"] = tutorials()
    pages |= reference()
    for file in [*files.documentation_pages()]:
        for linked in linked_sources(file.content_string, f"docs/{file.src_uri}"):
            pages[f"source/{linked}.md"] = source_page(linked)
    for target, content in pages.items():
        files.append(File.generated(config, target, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links that are right in the repository into those of the site; tables of data get its width."""
    here = page.file.src_uri
    if here.startswith("data/") and here != "data/README.md":  # wide tables: they get the columns beside the page too
        page.meta["hide"] = ["navigation", "toc"]
    source = next((name for name, target in MOVED.items() if target == here), f"docs/{here}")
    if here.startswith(("source/", "reference/")) or here == "tutorials/index.md":
        return markdown

    def moved(link: re.Match[str]) -> str:
        if ":" in link[2] or (here.startswith("tutorials/") and link[2].endswith(".png")):
            return link[0]
        target = posixpath.relpath(site_path(repository_path(link[2], source)), posixpath.dirname(here) or ".")
        return f"{link[1]}{target}{link[3]}"

    return LINK.sub(moved, markdown)


def on_post_page(output: str, page: Any, config: Any) -> str:
    """For screen readers the search has a name and a table's corner is no heading; no interval breaks over lines."""
    search = 'data-md-component="search" role="dialog"'
    output = re.sub(r"<th[^>]*></th>", "<td></td>", output).replace(search, f'{search} aria-label="Search"')
    return INTERVAL.sub(lambda found: found[0].replace(" ", "&nbsp;"), output)


def on_post_template(output_content: str, template_name: str, config: Any) -> str:
    """The page for a wrong address is none of the pages."""
    return on_post_page(output_content, None, config) if template_name.endswith(".html") else output_content


def repository_path(link: str, source: str) -> str:
    """The file that a page's relative link names, from the repository's root."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def site_path(path: str) -> str:
    """Where a file of the repository is on the site, as its Markdown page."""
    if path in MOVED:
        return MOVED[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"source/{path}.md"


def linked_sources(markdown: str, source: str) -> list[str]:
    """Files outside docs/ that a page links to and that are no page yet."""
    paths = {repository_path(link[2], source) for link in LINK.finditer(markdown) if ":" not in link[2]}
    return sorted(path for path in paths if site_path(path).startswith("source/") and (ROOT / path).is_file())


def source_page(path: str) -> str:
    """A file of the repository, as it is."""
    text = (ROOT / path).read_text(encoding="utf-8")
    content = text if path.endswith(".md") else f"# {path}\n\n{fenced(text, 'python')}\n"
    return f"---\nsearch: {{exclude: true}}\n---\n{content}"


def fenced(text: str, language: str = "text") -> str:
    """Text as a block of code, whatever it holds; what a cell printed is `{.text .printed}`."""
    return f"```` {language}\n{text.strip(chr(10))}\n````\n"


# The notebooks


def tutorial(path: Path) -> dict[str, str | bytes]:
    """A saved notebook as a page, with its images as files beside it."""
    book = json.loads(path.read_text(encoding="utf-8"))
    parts, images = [], {}
    for cell in book["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else fenced(text, "python"))
        for output in cell.get("outputs", ()):
            data = {kind: "".join(d) if isinstance(d, list) else d for kind, d in output.get("data", {}).items()}
            if "image/png" in data:
                name = f"{path.stem}-{len(images)}.png"
                images[f"tutorials/{name}"] = b64decode(data["image/png"])
                title = data.get("application/vnd.plotly.v1+json", {}).get("layout", {}).get("title", {}).get("text")
                parts.append(f"![{one_line(title or 'Figure')}]({name})\n")
            elif "text/html" in data:
                shown = data["text/html"].replace('border="1" class="dataframe"', "")  # the site's own look
                parts.append(f'<div class="output">{re.sub(chr(10) + "+", " ", shown)}</div>\n')
            else:
                parts.append(fenced(data.get("text/plain") or "".join(output.get("text", "")), "{.text .printed}"))
    first, *others = parts
    where = f"*This page is `notebooks/{path.name}`, as it was saved: open it in Jupyter to change it and run it.*\n"
    return {f"tutorials/{path.stem}.md": "\n\n".join([first, *others, where]), **images}


def one_line(text: str) -> str:
    return " ".join(re.sub(r"<[^>]*>|[\[\]]", " ", text).split())


def tutorials() -> str:
    """The list of the notebooks: title and first sentences of each."""
    rows = []
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        head = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
        title, _, about = head.removeprefix("# ").partition("\n")
        rows.append(f"**[{title}]({path.stem}.md)**  \n{' '.join(about.split())}")
    about = (
        "Each page is a notebook of the folder `notebooks/`, run on the model that comes with kt. All of them take "
        "another model and other facts from the variables `KT_MODEL` (a folder or a Hub id) and `KT_FACTS` (a file); "
        "`make test-real` runs them on SmolLM2."
    )
    return "\n\n".join(["# Tutorials", about, *rows])


# The reference


def shown(name: str) -> str:
    """A public name with its members; those of a model are also its base classes' (its weights)."""
    return f"::: kt.{name}" + ("\n    options: {inherited_members: true}" if name == "TracedModel" else "")


def reference() -> dict[str, str]:
    """The pages of the reference.

    Raises:
        PluginError: a public name is on no page.
    """
    names = [name for _, listed in REFERENCE.values() for name in listed.split()]
    if sorted(names) != sorted(kt.__all__):
        raise PluginError(f"tools/site/hooks.py, REFERENCE: differs from kt.__all__ by {set(names) ^ set(kt.__all__)}")
    pages = {
        f"reference/{page}.md": "\n\n".join([f"# {title}", EXAMPLES, *map(shown, listed.split())])
        for page, (title, listed) in REFERENCE.items()
    }
    pages["reference/errors.md"] = "\n\n".join(["# Errors", ERRORS, *(f"::: kt.errors.{name}" for name in KINDS)])
    import typer

    context = typer.Context(typer.main.get_command(app), info_name="kt", terminal_width=100)
    group: Commands = context.command  # type: ignore[assignment]
    parts = ["# Command line", "What `kt COMMAND --help` prints.", fenced(group.get_help(context))]
    for name, about in COMMANDS.items():
        command = group.get_command(context, name)
        text = command.get_help(typer.Context(command, info_name=name, parent=context, terminal_width=100))
        parts += [f"## kt {name}", about.line, fenced(text)]
    return {**pages, "reference/commands.md": "\n\n".join(parts)}
