"""The release, in one place that any party may import."""

VERSION = "0.1.0"
