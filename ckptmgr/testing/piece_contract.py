"""What must any store hold of large objects? That they can be written in pieces, read to their place and copied."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from .. import memory
from ..errors import AlreadyExistsError, NotFoundError, StoreError
from ..store import BLOCK, Store, Writer

if TYPE_CHECKING:
    from typing_extensions import Buffer

_MIB = 1 << 20
_PIECE = 64 * BLOCK
_SIZES = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, _MIB - 1, _MIB, _MIB + 1, 2 * _MIB + 3 * BLOCK + 7]


_dice = random.Random(1)  # noqa: S311 - no secrets here


def noise(size: int) -> bytes:
    """So many bytes of which no block is like another."""
    return _dice.randbytes(size)


def _aligned(data: bytes) -> memoryview:
    view = memory.buffer(len(data))
    view[:] = data
    return view


def _unaligned(data: bytes) -> memoryview:
    view = memory.buffer(len(data) + 8)[8:]
    view[:] = data
    return view


class PieceContract:
    """The part of `StoreContract` about `Writer.write_at`, `Reader` and `copy`.

    `can_place` and `can_copy` are False for a store that takes bytes in order only, or copies nothing itself.
    """

    can_place = True
    can_copy = True

    # Pieces

    @pytest.mark.parametrize("size", _SIZES)
    def test_pieces_in_any_order_make_the_whole(self, store: Store, size: int) -> None:
        data = noise(size)
        writer = store.writer("folder/key", size)
        assert writer.is_positional is self.can_place
        if not self.can_place:
            with pytest.raises(StoreError):
                writer.write_at(0, data)
            writer.abort()
            return
        places = list(range(0, size, _PIECE))
        _dice.shuffle(places)
        with ThreadPoolExecutor(3) as pool:
            # No two neighbours lie in memory in the same way.
            kinds = [(_aligned, _unaligned, bytes)[at // _PIECE % 3] for at in places]
            list(pool.map(lambda at, kind: writer.write_at(at, kind(data[at : at + _PIECE])), places, kinds))
        assert store.stat("folder/key") is None
        writer.commit()
        assert store.get("folder/key") == data

    @pytest.mark.parametrize("size", _SIZES)
    def test_an_object_whose_size_is_known_can_be_written_in_order(self, store: Store, size: int) -> None:
        data = noise(size)
        writer = store.writer("key", size)
        writer.write(data[:5])
        writer.write(data[5:])
        writer.commit()
        assert store.get("key") == data

    def test_an_object_of_unknown_size_is_written_in_order(self, store: Store) -> None:
        writer = store.writer("key")
        assert not writer.is_positional
        with pytest.raises(StoreError):
            writer.write_at(0, b"1")
        writer.abort()
        assert store.stat("key") is None

    def test_another_number_of_bytes_than_was_said_is_no_object(self, store: Store) -> None:
        def write(writer: Writer, count: int) -> None:
            writer.write(bytes(count))
            writer.commit()

        for count in (_MIB - 1, _MIB + 1, 0):
            writer = store.writer("key", _MIB)
            with pytest.raises(StoreError):
                write(writer, count)
            writer.abort()
        assert store.list(recursive=True) == []

    @pytest.mark.parametrize(
        "places", [[0], [BLOCK], [0, 2 * BLOCK], [0, 0, BLOCK], []], ids=["end", "begin", "hole", "twice", "all"]
    )
    def test_a_missing_piece_is_no_object(self, store: Store, places: list[int]) -> None:
        writer = store.writer("key", 3 * BLOCK)
        for place in places if self.can_place else []:
            writer.write_at(place, bytes(BLOCK))
        with pytest.raises(StoreError):
            writer.commit()
        writer.abort()
        assert store.list(recursive=True) == []

    def test_a_piece_may_be_placed_again(self, store: Store) -> None:
        if not self.can_place:
            return
        writer = store.writer("key", 2 * BLOCK)
        writer.write_at(0, b"x" * 2 * BLOCK)
        writer.write_at(0, b"1" * BLOCK)
        writer.write_at(BLOCK, b"2" * BLOCK)
        writer.commit()
        assert store.get("key") == b"1" * BLOCK + b"2" * BLOCK

    @pytest.mark.parametrize(
        ("offset", "count"),
        [(1, BLOCK), (0, BLOCK - 1), (-BLOCK, BLOCK), (3 * BLOCK, BLOCK), (2 * BLOCK, 2 * BLOCK), (2 * BLOCK, 99)],
    )
    def test_a_piece_that_fits_nowhere_is_refused(self, store: Store, offset: int, count: int) -> None:
        writer = store.writer("key", 2 * BLOCK + 100)
        with pytest.raises(StoreError):
            writer.write_at(offset, bytes(count))
        writer.abort()
        assert store.list(recursive=True) == []

    def test_pieces_and_bytes_in_order_do_not_mix(self, store: Store) -> None:
        if not self.can_place:
            return
        piece = bytes(BLOCK)
        writer = store.writer("key", 2 * BLOCK)
        writer.write(piece)
        with pytest.raises(StoreError):
            writer.write_at(BLOCK, piece)
        writer.abort()
        writer = store.writer("key", 2 * BLOCK)
        writer.write_at(0, piece)
        with pytest.raises(StoreError):
            writer.write(piece)
        writer.abort()
        assert store.list(recursive=True) == []

    def test_an_ended_writer_takes_no_more_pieces(self, store: Store) -> None:
        for end in ("commit", "abort"):
            writer = store.writer(end, BLOCK)
            if self.can_place:
                writer.write_at(0, bytes(BLOCK))
            else:
                writer.write(bytes(BLOCK))
            getattr(writer, end)()
            with pytest.raises(StoreError):
                writer.write_at(0, bytes(BLOCK))
            writer.abort()
        assert [entry.key for entry in store.list(recursive=True)] == ["commit"]

    # Reads to their place

    @pytest.mark.parametrize("size", [0, 1, 10_000, 2 * _MIB + 5])
    def test_a_reader_fills_the_buffers_one_after_the_other(self, store: Store, size: int) -> None:
        data = noise(size)
        store.put("folder/key", data)
        reader = store.reader("folder/key")
        for start in (0, 1, BLOCK, size, size + BLOCK):
            buffers: list[Buffer] = [bytearray(3), bytearray(0), bytearray(5000), memory.buffer(size)]
            expected = data[start : start + 5003 + size]
            assert reader.read_into(start, buffers) == len(expected)
            assert b"".join(buffers)[: len(expected)] == expected
        assert reader.read_into(0, []) == reader.read_into(0, [bytearray()]) == 0
        reader.close()

    def test_a_reader_fills_thousands_of_buffers_at_once(self, store: Store) -> None:
        data = noise(5000 * 7)
        store.put("key", data)
        reader = store.reader("key")
        buffers = [bytearray(7) for _ in range(5000)]
        assert reader.read_into(0, buffers) == len(data)
        assert b"".join(buffers) == data
        reader.close()

    @pytest.mark.parametrize("size", [1, BLOCK, 2 * _MIB - 1, 2 * _MIB, 2 * _MIB + 1])
    def test_whole_blocks_are_read_up_to_the_end(self, store: Store, size: int) -> None:
        """What lies behind the end of the object stays as it was."""
        data = noise(size)
        store.put("key", data)
        reader = store.reader("key")
        buffer = memory.buffer(3 * _MIB)
        assert reader.is_cached(0, size) in (True, False)
        assert reader.read_into(0, [buffer]) == size
        assert buffer[:size] == data
        assert buffer[size:] == bytes(3 * _MIB - size)
        start = size - size % BLOCK
        assert reader.read_into(start, [buffer[:BLOCK]]) == size - start
        reader.close()

    def test_three_threads_share_a_reader(self, store: Store) -> None:
        data = noise(3 * _MIB)
        store.put("key", data)
        reader = store.reader("key")
        buffer = memory.buffer(3 * _MIB)
        with ThreadPoolExecutor(3) as pool:
            places = range(0, 3 * _MIB, _PIECE)
            counts = list(pool.map(lambda at: reader.read_into(at, [buffer[at : at + _PIECE]]), places))
        reader.close()
        assert set(counts) == {_PIECE}
        assert buffer == data

    def test_a_reader_of_what_is_missing_is_not_found(self, store: Store) -> None:
        store.put("folder/key", b"1")
        for key in ("missing", "folder/missing", "folder/key/below"):
            with pytest.raises(NotFoundError):
                store.reader(key).read_into(0, [bytearray(1)])

    def test_a_closed_reader_reads_no_more(self, store: Store) -> None:
        store.put("key", b"1")
        reader = store.reader("key")
        reader.close()
        reader.close()
        with pytest.raises(StoreError):
            reader.read_into(0, [bytearray(1)])

    # Copies

    def test_a_copy_has_the_bytes_and_a_life_of_its_own(self, store: Store) -> None:
        data = noise(100_000)
        store.put("old/key", data)
        assert store.copy("old/key", "new/deep/copy") is self.can_copy
        if not self.can_copy:
            assert [entry.key for entry in store.list(recursive=True)] == ["old/key"]
            return
        assert store.get("new/deep/copy") == data
        store.put("old/key", b"replaced")
        assert store.get("new/deep/copy") == data
        store.delete(["old/"])
        assert store.get("new/deep/copy") == data
        assert store.copy("new/deep/copy", "new/again")
        store.delete(["new/deep/copy"])
        assert [(e.key, e.size) for e in store.list(recursive=True)] == [("new/again", len(data))]

    @pytest.mark.parametrize("key", ["with space", "a+b=c@d%20~e-f_g", "ünïcode/名前", "query?x=1#part", "empty"])
    def test_odd_keys_are_copied_like_any_other(self, store: Store, key: str) -> None:
        data = b"" if key == "empty" else b"1"
        store.put(key, data)
        if store.copy(key, f"copies/{key}"):
            assert store.get(f"copies/{key}") == data

    def test_a_copy_goes_over_nothing(self, store: Store) -> None:
        store.put("a", b"old")
        store.put("b", b"new")
        with pytest.raises(AlreadyExistsError):
            store.copy("b", "a")
        with pytest.raises(NotFoundError):
            store.copy("missing", "c")
        assert [store.get("a"), store.get("b"), store.stat("c")] == [b"old", b"new", None]
