"""Every input in the corpus, those that once crashed among them."""

from __future__ import annotations

import pytest
from fuzz.wire_harness import COMMITTED, CORPUS, TEMPLATES, check, decodes, seal, seeds

from fedlora.transport import layout, symbols


@pytest.mark.parametrize("path", sorted(CORPUS.iterdir()), ids=lambda path: path.name)
def test_input_is_refused_or_decodes(path):
    check(path.read_bytes())


def test_the_first_inputs_are_messages_of_this_format():
    # after a change of the format: PYTHONPATH=tests .venv/bin/python tests/fuzz/wire_harness.py
    inputs = seeds()
    for name in COMMITTED:
        data = (CORPUS / name).read_bytes()
        assert "outside" in name or data == inputs[name], name  # another zlib may write other streams
        assert len(data) < 1000
        like = TEMPLATES[data[0]]
        assert decodes(seal(data[1:], like), like)


def test_they_reach_every_number_format_and_layout(monkeypatch):
    seen, read = set(), layout._read_table

    def spy(reader, count):
        layouts = read(reader, count)
        seen.update(layouts)
        return layouts

    monkeypatch.setattr(layout, "_read_table", spy)
    inputs = [data for name, data in seeds().items() if name in COMMITTED]
    for data in inputs:
        check(data)
    assert seen == set(range(7))
    assert {data[1] for data in inputs} == {1, 2, 3, 4}
    assert {data[2] for data in inputs if data[1] == 4} == {1, 2, 4, 8}


def test_they_reach_every_coding(monkeypatch):
    pools, codings = set(), set()
    decode_pool, decode = layout.decode_pool, symbols.decode

    def spy_on_pool(reader, segment, coding):
        pools.add(coding)
        return decode_pool(reader, segment, coding)

    def spy_on_symbols(reader, bits, total):
        codings.add(reader._raw[reader._at])
        return decode(reader, bits, total)

    monkeypatch.setattr(layout, "decode_pool", spy_on_pool)
    monkeypatch.setattr(symbols, "decode", spy_on_symbols)
    for name in COMMITTED:
        check((CORPUS / name).read_bytes())
    assert {1, 2} <= pools
    assert set(range(6)) <= codings
