"""AutoAWQ's import paths: each leads to what does that work here, or fails in a sentence that names it.

AutoAWQ kept its code in `awq.models`, `awq.modules`, `awq.quantize`, `awq.utils` and `awq.evaluation`, and
people imported from there. Those modules do not exist as files. A finder at the end of `sys.meta_path`, which
Python asks only when nothing else has the module, makes them when they are imported, from the table in
`awq.legacy.table`.

`awq.quantize` is a function of ours and was a package of AutoAWQ's; see `finder` for how it is both.
"""

from awq.legacy.finder import install

__all__ = ["install"]
