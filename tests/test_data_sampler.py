"""The sampler's sequence and the loader's batches: complete, equal for all ranks, and resumable at any step."""

import hashlib
import subprocess
import sys
import threading
import warnings
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from mindsigma.data import BucketSampler, Loader, Records, Resolution, generator, open_records
from mindsigma.data.aspect_ratio import closest_bin, training_bins
from mindsigma.data.images import training_array
from mindsigma.data.record import Record
from mindsigma.errors import MindSigmaError

MULTI = Resolution(256, multi_scale=True)


def source(count=500, seed=0):
    """Sizes that fall into many buckets, unevenly."""
    random = np.random.default_rng(seed)
    width = random.integers(100, 1000, count)
    ratio = np.exp(random.normal(0, 0.5, count)).clip(0.23, 4.4)
    return SimpleNamespace(sizes=np.stack([np.maximum(1, width * ratio).astype(np.int64), width], 1))


# the sampler


@pytest.mark.parametrize("epoch", [0, 3])
def test_an_epoch_takes_every_record_and_counts_the_repeats(epoch):
    data = source()
    sampler = BucketSampler(data, 16, MULTI, seed=1)
    summary, seen, batches = sampler.summary(), Counter(), Counter()
    draws = []
    for step in range(epoch * len(sampler), (epoch + 1) * len(sampler)):
        bucket, indices, numbers = sampler.batch(step)
        assert indices.shape == numbers.shape == (16,) and indices.dtype == numbers.dtype == np.int64
        for i in indices:
            assert closest_bin(*data.sizes[i], training_bins(256)) == (bucket.aspect_ratio, bucket[1:])
        seen.update(indices.tolist())
        batches[bucket] += 1
        draws += numbers.tolist()
    assert set(seen) == set(range(500)) and sum(seen.values()) == 500 + summary.repeated
    assert draws == list(range(epoch * len(draws), (epoch + 1) * len(draws)))
    assert summary.records == 500 and summary.dropped == 0 and summary.steps == len(sampler)
    assert {count.bucket: count.batches for count in summary.buckets} == batches
    for count in summary.buckets:
        assert count.batches * 16 == count.records + count.repeated and 0 <= count.repeated < 16
        members = [i for i in range(500) if closest_bin(*data.sizes[i], training_bins(256))[1] == count.bucket[1:]]
        times = [seen[i] for i in members]
        assert max(times) - min(times) <= 1  # nobody is repeated twice before all are once
    assert sampler.buckets() == sorted(batches)
    assert str(summary.repeated) in str(summary).splitlines()[-1]


def test_dropping_counts_what_it_drops():
    data = source()
    sampler = BucketSampler(data, 16, MULTI, seed=1, incomplete="drop")
    summary = sampler.summary()
    taken = np.concatenate([sampler.batch(step)[1] for step in range(len(sampler))])
    assert len(set(taken.tolist())) == len(taken) == 500 - summary.dropped and summary.repeated == 0
    assert all(count.dropped == count.records % 16 for count in summary.buckets)
    other = np.concatenate([sampler.batch(step)[1] for step in range(len(sampler), 2 * len(sampler))])
    assert set(other.tolist()) != set(taken.tolist())  # others are left out in the next epoch
    with pytest.raises(MindSigmaError, match="smaller batch"):
        BucketSampler(source(20), 64, MULTI, incomplete="drop")


def test_epochs_and_seeds_differ_and_the_order_mixes_buckets():
    sampler = BucketSampler(source(), 4, MULTI, seed=1)
    steps = len(sampler)
    orders = [[sampler.batch(e * steps + s)[1].tolist() for s in range(steps)] for e in (0, 1)]
    other = BucketSampler(source(), 4, MULTI, seed=2)
    assert orders[0] != orders[1] and orders[0] != [other.batch(s)[1].tolist() for s in range(steps)]
    ratios = [sampler.batch(s)[0].aspect_ratio for s in range(steps)]
    changes = sum(a != b for a, b in zip(ratios, ratios[1:]))
    assert changes > steps / 2  # sorted by bucket there would be as many as buckets


def test_any_step_at_any_time():
    sampler = BucketSampler(source(), 8, MULTI, seed=5)
    steps = list(range(3 * len(sampler)))
    straight = [sampler.batch(step) for step in steps]
    fresh = BucketSampler(source(), 8, MULTI, seed=5)
    for step in np.random.default_rng(0).permutation(steps)[:60].tolist():
        bucket, indices, draws = fresh.batch(step)
        assert bucket == straight[step][0]
        assert np.array_equal(indices, straight[step][1]) and np.array_equal(draws, straight[step][2])
    assert sampler.position(2 * len(sampler) + 3) == (2, 3)
    with pytest.raises(MindSigmaError):
        sampler.batch(-1)


def test_another_process_draws_the_same():
    code = (
        "import sys; sys.path[:0] = ['tests', '.']; import hashlib, numpy as np;"
        "from test_data_sampler import digest; print(digest())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == digest()


def digest():
    sampler = BucketSampler(source(), 8, MULTI, seed=5)
    return hashlib.sha256(np.concatenate([sampler.batch(s)[1] for s in range(99)]).tobytes()).hexdigest()


def test_one_square_size():
    resolution = Resolution(256)
    sampler = BucketSampler(source(), 32, resolution)
    assert sampler.buckets() == [(1.0, 256, 256)] and len(sampler) == 16 and sampler.summary().repeated == 12
    assert resolution.resampling == "bilinear" and resolution.condition(np.array([[5, 6]])).tolist() == [[256, 256]]


def test_a_bucket_smaller_than_the_batch_is_filled_evenly():
    sampler = BucketSampler(SimpleNamespace(sizes=np.array([[10, 10]] * 3)), 8, MULTI)
    assert len(sampler) == 1 and sampler.summary().repeated == 5
    assert sorted(Counter(sampler.batch(0)[1].tolist()).values()) == [2, 3, 3]


@pytest.mark.parametrize("table, base", [("training", 2880), ("training", 1024), ("inference", 2048), ("test", 2048)])
def test_the_nearest_bucket_is_that_of_the_table(table, base):
    resolution = Resolution(base, True, table)
    bins = {str(b.aspect_ratio): b[1:] for b in resolution.buckets()}
    sizes = source(300, seed=3).sizes
    for size, i in zip(sizes, resolution.assign(sizes)):
        assert (resolution.buckets()[i].aspect_ratio, resolution.buckets()[i][1:]) == closest_bin(*size, bins)


def test_filters_and_conditions():
    assert [Resolution(base, True).resampling for base in (512, 1024, 2048, 2880)] == ["bicubic"] * 2 + ["lanczos"] * 2
    assert MULTI.condition(np.array([[300, 400]])).tolist() == [[300.0, 400.0]]
    for wrong in ((768, True), (100, False), (0, False), (2880, True, "inference"), (256, True, "other")):
        with pytest.raises(MindSigmaError):
            Resolution(*wrong)
    for batch, options in ((0, {}), (4, {"incomplete": "keep"})):
        with pytest.raises(MindSigmaError):
            BucketSampler(source(), batch, MULTI, **options)
    with pytest.raises(MindSigmaError):
        BucketSampler(Records([]), 4, MULTI)


# random numbers


def test_streams_depend_on_seed_purpose_and_draw_alone():
    value = generator(7, "noise", 12).standard_normal(8)
    generator(7, "noise", 11).standard_normal(100)
    assert np.array_equal(generator(7, "noise", 12).standard_normal(8), value)
    others = [generator(8, "noise", 12), generator(7, "flip", 12), generator(7, "noise", 13), generator(12, "noise", 7)]
    for other in others:
        assert not np.isin(value, other.standard_normal(1000)).any()
    for wrong in ((-1, 0), (2**64, 0), (0, -1)):
        with pytest.raises(MindSigmaError):
            generator(wrong[0], "noise", wrong[1])
    first = [generator(3, "caption", draw).random() for draw in range(4000)]
    assert abs(np.mean(first) - 0.5) < 0.02 and abs(np.mean(np.array(first) < 0.1) - 0.1) < 0.02


# the loader


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    records = []
    for i, (height, width) in enumerate(source(30, seed=4).sizes // 8):
        path = folder / f"{i:02}.png"
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(path)
        records.append(
            Record(path.name, f"short {i}", f"long {i}" if i % 3 else "", int(height), int(width), str(path))
        )
    return Records(records)


def load(images, batch_size=4, start=0, stop=None, **options):
    sampler = BucketSampler(images, batch_size, Resolution(256, True), seed=2)
    return list(Loader(images, sampler, seed=9, **options).batches(start, stop or len(sampler)))


def assert_equal(one, other):
    for name, value in vars(one).items():
        assert np.array_equal(value, getattr(other, name)), name


def test_batches_hold_what_the_sampler_names(images):
    sampler = BucketSampler(images, 4, MULTI, seed=2)
    for batch in load(images, real_prompt_ratio=0.5, stop=6):
        bucket, indices, draws = sampler.batch(batch.step)
        assert (batch.height, batch.width) == bucket[1:] and np.array_equal(batch.draws, draws)
        assert batch.images.shape == (4, 3, *bucket[1:]) and batch.images.dtype == np.float32
        assert batch.aspect_ratio.tolist() == [[np.float32(bucket.aspect_ratio)]] * 4
        assert batch.aspect_ratio.dtype == batch.image_size.dtype == np.float32 and batch.dropped.dtype == bool
        for row, i in enumerate(indices):
            assert np.array_equal(batch.images[row], training_array(images.image(i), *bucket[1:], "bicubic"))
            assert batch.captions[row] in (f"short {i}", f"long {i}") and batch.image_size[row].tolist() == list(
                images.sizes[i]
            )
        assert batch.moments is batch.states is batch.mask is None


def test_threads_change_nothing(images):
    for one, many in zip(load(images, threads=1, prefetch=1, flip=0.5), load(images, threads=4, prefetch=3, flip=0.5)):
        assert_equal(one, many)


def test_ranks_share_the_batch_of_one(images):
    whole = load(images)
    shares = [load(images, rank=rank, ranks=2) for rank in (0, 1)]
    assert len(whole) == len(shares[0]) == len(shares[1])
    for one, a, b in zip(whole, *shares):
        assert (a.height, a.width, a.step) == (b.height, b.width, b.step) == (one.height, one.width, one.step)
        for name in ("draws", "dropped", "images", "image_size", "aspect_ratio"):
            assert np.array_equal(np.concatenate([getattr(a, name), getattr(b, name)]), getattr(one, name)), name
        assert a.captions + b.captions == one.captions


def test_a_run_resumes_at_the_next_sample(images):
    whole = load(images, stop=12)
    for start in (1, 7, 11):
        for one, other in zip(whole[start:], load(images, start=start, stop=12)):
            assert_equal(one, other)


def test_shares_of_the_random_choices(images):
    loader = Loader(
        images, BucketSampler(images, 4, MULTI), seed=3, real_prompt_ratio=0.3, caption_dropout=0.1, flip=0.6
    )
    shares = np.mean([loader.choices(draw) for draw in range(4000)], 0)
    assert np.abs(shares - (0.3, 0.1, 0.6)).max() < 0.025
    always = Loader(images, BucketSampler(images, 4, MULTI), real_prompt_ratio=1, caption_dropout=0, flip=0)
    assert {always.choices(draw) for draw in range(300)} == {(True, False, False)}


def test_flip_mirrors(images):
    for plain, mirrored in zip(load(images, stop=3), load(images, stop=3, flip=1.0)):
        assert np.array_equal(plain.images[..., ::-1], mirrored.images)


def test_one_caption_is_taken_where_the_other_is_missing(images):
    for batch in load(images, real_prompt_ratio=0.0):
        numbers = [int(caption.split()[1]) for caption in batch.captions]
        assert batch.captions == [f"{'long' if i % 3 else 'short'} {i}" for i in numbers]


def broken(images, folder, numbers):
    """The records with the images of these numbers cut in half behind a sound header."""
    records = list(images)
    for number in numbers:
        file = folder / f"broken{number:02}.png"
        data = open(images[number].file, "rb").read()
        file.write_bytes(data[: len(data) // 2])
        records[number] = records[number]._replace(file=str(file))
    return Records(records)


def test_a_broken_file_stops_a_strict_run_at_its_step_with_its_name(images, tmp_path):
    records = broken(images, tmp_path, [0])
    sampler = BucketSampler(records, 4, MULTI, seed=2)
    first = next(step for step in range(len(sampler)) if 0 in sampler.batch(step)[1])
    loader, steps = Loader(records, sampler, threads=2, prefetch=8, max_bad_images=0), []
    with pytest.raises(MindSigmaError, match=r"broken00\.png.*prepare_data.*the same command goes on"):
        for batch in loader.batches(0, len(sampler)):
            steps.append(batch.step)
    assert steps == list(range(first))


def test_another_record_of_the_bucket_takes_the_place_of_a_broken_one(images, tmp_path):
    """The same for any number of threads and ranks, after a resume, and where the record is gone instead."""
    counts = Counter(map(int, MULTI.assign(images.sizes)))
    bucket = max(counts, key=counts.get)
    members = np.flatnonzero(MULTI.assign(images.sizes) == bucket)
    assert len(members) > 2
    bad = members[:2].tolist()
    records = broken(images, tmp_path, bad)
    with pytest.warns(UserWarning, match="another takes its place") as warned:
        whole = load(records, flip=0.5)
    assert len(warned) == 2 and sum(batch.replaced for batch in whole)
    sampler = BucketSampler(images, 4, MULTI, seed=2)
    for batch, plain in zip(whole, load(images, flip=0.5)):
        rows = np.isin(sampler.batch(batch.step)[1], bad)
        assert batch.replaced == rows.sum() and batch.dropped.tolist() == plain.dropped.tolist()
        assert np.array_equal(batch.images[~rows], plain.images[~rows])
        for row in np.flatnonzero(rows):
            number = int(batch.captions[row].split()[1])
            assert number in members and number not in bad and batch.images[row].std() > 0.1
            assert batch.image_size[row].tolist() == list(images.sizes[number])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for batch in load(records, flip=0.5, start=5, threads=1):
            assert_equal(batch, whole[batch.step])
        for rank in (0, 1):
            for share in load(records, flip=0.5, rank=rank, ranks=2):
                half = slice(2 * rank, 2 * rank + 2)
                assert np.array_equal(share.images, whole[share.step].images[half])
                assert share.captions == whole[share.step].captions[half]
    left = [i for i in range(len(images)) if i not in bad]
    places = np.array([left.index(i) if i in left else -1 for i in range(len(images))])
    fewer = Records([images[i] for i in left])
    for batch in Loader(fewer, sampler, seed=9, flip=0.5, places=places, max_bad_images=0).batches(0, len(whole)):
        assert_equal(batch, whole[batch.step])


def test_where_a_bucket_has_no_other_the_nearest_one_gives(images, tmp_path):
    assigned = MULTI.assign(images.sizes)
    alone = next(i for i in range(len(images)) if (assigned == assigned[i]).sum() == 1)
    records = broken(images, tmp_path, [alone])
    sampler = BucketSampler(records, 4, MULTI, seed=2)
    step = next(step for step in range(len(sampler)) if alone in sampler.batch(step)[1])
    loader = Loader(records, sampler, real_prompt_ratio=1)
    with pytest.warns(UserWarning, match=f"broken{alone:02}"):
        batch = next(loader.batches(step, step + 1))
    assert batch.replaced == 4 and batch.images.std() > 0.1
    ratio = sampler.batch(step)[0].aspect_ratio
    ratios = np.array([bucket.aspect_ratio for bucket in MULTI.buckets()])[assigned] / ratio
    nearest = np.delete(np.maximum(ratios, 1 / ratios), alone).min()
    for caption in batch.captions:
        number = int(caption.split()[1])
        assert max(ratios[number], 1 / ratios[number]) == nearest


def test_more_bad_images_than_may_be_end_the_run(images, tmp_path):
    records = broken(images, tmp_path, range(len(images)))
    for limit, said in ((3, "--max-bad-images N leaves out up to N"), (len(images), "none of the images can be read")):
        loader = Loader(records, BucketSampler(records, 4, MULTI, seed=2), max_bad_images=limit)
        with pytest.raises(MindSigmaError, match=f"broken.*{said}|{said}.*broken"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            list(loader.batches(0, 1))


def test_an_image_far_from_its_bucket_is_bad(images, tmp_path):
    """A line of pixels, resized to cover a square, takes gigabytes."""
    Image.new("RGB", (20000, 1)).save(tmp_path / "line.png")
    records = Records([images[0]._replace(file=str(tmp_path / "line.png")), images[1]])
    loader = Loader(records, BucketSampler(records, 2, Resolution(64)), max_bad_images=0)
    with pytest.raises(MindSigmaError, match=r"line\.png: is 1 x 20000"):
        list(loader.batches(0, 1))


def test_leaving_the_loop_ends_the_threads_and_little_is_read_ahead(images):
    reads = []

    class Counting(Records):
        def image(self, index):
            reads.append(index)
            return super().image(index)

    records = Counting(list(images))
    sampler = BucketSampler(records, 4, MULTI, seed=2)
    batches = Loader(records, sampler, threads=2, prefetch=2).batches()
    next(batches)
    batches.close()
    assert len(reads) <= 4 * 3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


@pytest.mark.parametrize(
    "options",
    [
        {"ranks": 3},
        {"rank": 2, "ranks": 2},
        {"threads": 0},
        {"prefetch": 0},
        {"real_prompt_ratio": 1.5},
        {"caption_dropout": -0.1},
        {"flip": float("nan")},
        {"max_bad_images": -1},
    ],
)
def test_options_out_of_range_are_refused(images, options):
    with pytest.raises(MindSigmaError):
        Loader(images, BucketSampler(images, 4, MULTI), **options)


def test_a_shard_is_loaded_as_its_files(images, tmp_path):
    from mindsigma.data.prepared import convert

    convert(images, tmp_path / "shards", "webdataset", shard_records=7)
    for one, other in zip(load(images, stop=3), load(open_records(tmp_path / "shards", progress=False), stop=3)):
        assert_equal(one, other)
