"""Tests of the LLaVA-Mini paper's claims on any records, one module for each kind of claim; docs/claims.md defines them.

- Claims about one model: `attention`, `removal`, `onset` and `knockout` read the probes of a record.
- Claims about trained variants: `prefusion`, `tokens` and `compression` compare rows that `families` finds by settings.
- `shares` and `steps` hold the statistics of the two kinds, `registry` all claims and their answers.
"""
