"""Benchmarks: each path beside its physical limit and beside what a user would pick instead, in turn, in one run.

docs/benchmarks.md says what each row means. A name of `testbed bench` is a module of `testbed.bench.names`.
"""
