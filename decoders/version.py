"""The version of this code: what the wheel is called by, and what an exported decoder says it was written with."""

VERSION = "0.1.0"
