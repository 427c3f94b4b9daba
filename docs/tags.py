"""Prints the tables of fidelity.md: what the code says behind `# quirk:` and `# departs:`.

    python docs/tags.py

A tag is a comment of one line or several, and ends with the name of its test in brackets.
"""

import re
import subprocess

HEADS = {"quirk": "## Quirks kept\n\nReleased weights expect them (`# quirk:` in the code).\n",
         "departs": "## Departures made\n\nOn purpose (`# departs:` in the code).\n"}
TAG = re.compile(r"# (quirk|departs): (.*?) \[(test_\w+)\]", re.S)


def tags():
    """Yields (kind, what the comment says, file, test) of every tag of the product."""
    command = ["git", "ls-files", "*.py", ":!tests", ":!docs"]
    files = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    for name in files:
        text = open(name, encoding="utf-8").read()
        for kind, words, test in TAG.findall(text):
            yield kind, " ".join(re.sub(r"\n\s*#?", " ", words).split()), name, test


def table(kind):
    """The table of one kind of tag, in Markdown."""
    rows = [f"| {words} | `{name}` | `{test}` |"
            for found, words, name, test in tags() if found == kind]
    return "\n".join([HEADS[kind], f"| {kind} | file | test |", "|---|---|---|", *rows])


if __name__ == "__main__":
    print(table("quirk") + "\n\n" + table("departs"))
