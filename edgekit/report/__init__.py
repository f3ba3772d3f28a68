"""A run's records and files → terminal tables, Markdown, and one HTML page that needs nothing else.

figures         a number as people read it
records         what the stages wrote, read back
evaluation      metrics.json in rows and words, by task
quantization    quantize.json in rows and words
tables          the terminal's tables
page            report.html
"""

from edgekit.report.evaluation import markdown_metrics
from edgekit.report.figures import megabytes, percent
from edgekit.report.page import write_report
from edgekit.report.records import read_history, read_quantization
from edgekit.report.tables import (
    backbones_table,
    comparison_lines,
    comparison_table,
    demo_table,
    emulated_reasons,
    emulated_table,
    float_layers_table,
    history_table,
    latency_lines,
    latency_table,
    metrics_table,
    parity_table,
    per_class_table,
    problems_table,
    quantize_table,
    threads_table,
    verdicts_table,
    workload_table,
)

__all__ = [
    "backbones_table",
    "comparison_lines",
    "comparison_table",
    "demo_table",
    "emulated_reasons",
    "emulated_table",
    "float_layers_table",
    "history_table",
    "latency_lines",
    "latency_table",
    "markdown_metrics",
    "megabytes",
    "metrics_table",
    "parity_table",
    "per_class_table",
    "percent",
    "problems_table",
    "quantize_table",
    "read_history",
    "read_quantization",
    "threads_table",
    "verdicts_table",
    "workload_table",
    "write_report",
]
