"""An extension of Griffe for mkdocs.yml: the `Example:` of our docstrings is the section that Griffe calls `Examples:`.

Griffe takes `Example:` for a remark in Markdown, in which `>>>` is a quotation.
"""

import re

from griffe import Extension, Object


class Examples(Extension):
    """Give the examples in docstrings the heading that Griffe shows as code."""

    def on_object(self, *, obj: Object, **_: object) -> None:
        """Change the docstring of an object that has been read."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
