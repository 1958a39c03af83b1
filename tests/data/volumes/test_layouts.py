import shlex
from pathlib import Path

import pytest

from memsave.data import DataError
from memsave.data.volumes.layouts import LAYOUTS, MODALITIES, find_cases, scan
from memsave.data.volumes.reader import read_case
from memsave.data.volumes.schemes import SCHEMES
from tests.support.volume_files import SHAPE, brats, decathlon, save

REAL = Path(__file__).parents[4] / "shared" / "data" / "brain-mri"
FILES_2023 = ("t1n", "t1c", "t2w", "t2f")


def values_of(case):
    """The value of each modality of a case, in order."""
    return read_case(case).image[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("layout", ["brats2018", "brats2019", "brats2020", "brats2021"])
def test_brats_until_2021(tmp_path, layout):
    brats(tmp_path / "HGG", "A")
    brats(tmp_path / "LGG", "B", suffix=".nii")
    cases = find_cases(tmp_path, layout)
    assert [case.id for case in cases] == ["A", "B"]
    assert all(values_of(case) == [1, 2, 3, 4] and case.modalities == MODALITIES for case in cases)
    assert cases[0].scheme.name == "brats2021" and cases[0].patient is None


@pytest.mark.parametrize("layout", ["brats2023", "brats2024"])
def test_brats_since_2023(tmp_path, layout):
    for id in ("BraTS-GLI-00005-101", "BraTS-GLI-00005-100", "BraTS-GLI-00006-000"):
        brats(tmp_path / "Training", id, separator="-", parts=FILES_2023)
    cases = find_cases(tmp_path, layout)
    assert [case.id[-9:] for case in cases] == ["00005-100", "00005-101", "00006-000"]
    assert values_of(cases[0]) == [1, 2, 3, 4] and cases[0].modalities == MODALITIES
    assert cases[0].scheme is SCHEMES[layout]
    assert [case.patient for case in cases] == ["BraTS-GLI-00005", "BraTS-GLI-00005", "BraTS-GLI-00006"]


def test_decathlon_modalities_are_in_canonical_order(tmp_path):
    decathlon(tmp_path, "BRATS_002")
    decathlon(tmp_path, "BRATS_001")
    decathlon(tmp_path, "BRATS_900", label=None, folder="imagesTs")
    for folder in ("imagesTr", "labelsTr", "imagesTs"):
        (tmp_path / folder / "._BRATS_001.nii.gz").write_text("what macOS leaves")
    cases = find_cases(tmp_path, "msd")
    assert [case.id for case in cases] == ["BRATS_001", "BRATS_002"]
    assert values_of(cases[0]) == [1, 2, 3, 4] and cases[0].modalities == MODALITIES
    assert cases[0].scheme.name == "msd" and read_case(cases[0]).label.shape == SHAPE
    everything = find_cases(tmp_path, "msd", labelled=False)
    assert [case.id for case in everything] == ["BRATS_001", "BRATS_002", "BRATS_900"]
    assert everything[2].label is None and values_of(everything[2]) == [1, 2, 3, 4]
    assert values_of(find_cases(tmp_path, "msd", modalities=["flair", "t1ce"])[0]) == [4, 2]


def test_missing_decathlon_files_are_reported(tmp_path):
    decathlon(tmp_path, "BRATS_001", label=None)
    save(tmp_path / "labelsTr" / "BRATS_002.nii.gz")
    faults = scan(tmp_path, "msd").faults
    assert len(faults) == 2
    assert "BRATS_001 misses labelsTr/BRATS_001.nii.gz:" in faults[0]
    assert "BRATS_002 misses imagesTr/BRATS_002.nii.gz:" in faults[1]
    decathlon(tmp_path, "BRATS_003")
    save(tmp_path / "imagesTr" / "BRATS_003.nii", shape=(*SHAPE, 4))
    (fault,) = scan(tmp_path, "msd").faults[2:]
    assert "BRATS_003 has several files for one modality or mask, BRATS_003.nii and BRATS_003.nii.gz" in fault


def test_a_decathlon_file_with_too_few_channels_is_reported(tmp_path):
    save(tmp_path / "imagesTr" / "BRATS_001.nii.gz", shape=(*SHAPE, 2))
    save(tmp_path / "labelsTr" / "BRATS_001.nii.gz", 0)
    with pytest.raises(DataError, match=r"BRATS_001\.nii\.gz has shape \(5, 4, 3, 2\) and should hold 4 channels"):
        read_case(find_cases(tmp_path, "msd")[0])


@pytest.mark.parametrize("folders", [True, False])
@pytest.mark.parametrize("mask", ["seg", "label", "mask"])
def test_a_folder_of_any_modalities(tmp_path, folders, mask):
    for id in ("B_2", "A"):
        where = tmp_path / id if folders else tmp_path
        save(where / f"{id}_t1_ce.nii.gz", 7)
        save(where / f"{id}_pet.nii", 8)
        save(where / f"{id}_ct.nii.gz", 9)  # not selected
        save(where / f"{id}_{mask}.nii.gz", 1)
    cases = find_cases(tmp_path, "folder", modalities=["pet", "t1_ce"])
    assert [case.id for case in cases] == ["A", "B_2"]
    assert cases[0].modalities == ("pet", "t1_ce") and values_of(cases[0]) == [8, 7]
    assert cases[0].scheme.name == "binary" and read_case(cases[0]).label.all()


def test_the_longest_matching_modality_name_wins(tmp_path):
    for part, value in (("ce", 1), ("t1_ce", 2), ("roi", 1)):
        save(tmp_path / f"A_{part}.nii.gz", value)
    (case,) = find_cases(tmp_path, "folder", modalities=["ce", "t1_ce"], mask="roi", scheme="brats2021")
    assert case.id == "A" and values_of(case) == [1, 2] and case.scheme.name == "brats2021"


def test_a_file_that_belongs_to_no_case_is_reported(tmp_path):
    for name in ("A_image", "A_label", "B_imgae", "B_label", "C", "_image"):
        save(tmp_path / f"{name}.nii.gz")
    with pytest.raises(DataError, match=r"/C\.nii\.gz belongs to no case: rename it to ID_image\.nii\.gz") as caught:
        find_cases(tmp_path, "folder", modalities=["image"], mask="label", labelled=False)
    settings = f"root={tmp_path} layout=folder 'modalities=[image]' mask=label labelled=false"
    command = f"python -m memsave.data.check {settings}"
    assert str(caught.value).endswith(f"; 2 more faults are listed by {command}.")
    found = scan(tmp_path, "folder", modalities=["image"])
    assert [case.id for case in found.cases] == ["A"] and [case.id for case in found.incomplete] == ["B"]
    assert len(found.faults) == 3 and "/_image.nii.gz belongs to no case" in found.faults[1]
    assert "Case " in found.faults[2] and "B misses B_image.nii.gz:" in found.faults[2]


def test_two_masks_for_one_case_are_an_error(tmp_path):
    for name in ("A_image", "A_label", "A_seg"):
        save(tmp_path / f"{name}.nii.gz")
    with pytest.raises(DataError, match=r"A has several files .*, A_seg\.nii\.gz and A_label\.nii\.gz: .* give mask="):
        find_cases(tmp_path, "folder", modalities=["image"])
    (case,) = find_cases(tmp_path, "folder", modalities=["image"], mask="label")
    assert case.label == tmp_path / "A_label.nii.gz"


def test_a_missing_mask_is_named_by_all_its_names(tmp_path):
    save(tmp_path / "A_image.nii.gz")
    with pytest.raises(DataError, match=r"misses A_seg\.nii\.gz or A_label\.nii\.gz or A_mask\.nii\.gz:"):
        find_cases(tmp_path, "folder", modalities=["image"])
    (case,) = find_cases(tmp_path, "folder", modalities=["image"], labelled=False)
    assert case.label is None


def test_a_real_scan_is_found_with_layout_folder():
    if not REAL.is_dir():
        pytest.skip("the real volume is not here")
    (case,) = find_cases(REAL, "folder", modalities=["image"], mask="label")
    scan = read_case(case)
    assert case.id == "brain1" and scan.image.shape == (1, 256, 256, 25)
    assert scan.label.sum() == 4137


@pytest.mark.parametrize("layout", ["brats2021", "brats2023"])
def test_modalities_can_be_selected_and_ordered(tmp_path, layout):
    separator, parts = ("_", MODALITIES) if layout == "brats2021" else ("-", FILES_2023)
    brats(tmp_path, "A", separator=separator, parts=parts)
    (tmp_path / "A" / f"A{separator}{parts[0]}.nii.gz").unlink()
    (case,) = find_cases(tmp_path, layout, modalities=["flair", "t1ce"])
    assert case.modalities == ("flair", "t1ce") and values_of(case) == [4, 2]


def test_another_layout_that_fits_is_suggested(tmp_path):
    brats(tmp_path / "2023", "A", separator="-", parts=FILES_2023)
    decathlon(tmp_path / "msd", "BRATS_001")
    with pytest.raises(
        DataError, match=r"brats2021, .* perhaps brats2023 or brats2024 \(in a run, data.layout=brats2023\)"
    ):
        find_cases(tmp_path / "2023")
    with pytest.raises(DataError, match=r"perhaps msd \(in a run, data\.layout=msd\)\.$"):
        find_cases(tmp_path / "msd", "brats2023")
    with pytest.raises(DataError, match=r"of layout msd, .* perhaps brats2023 or brats2024 "):
        find_cases(tmp_path / "2023", "msd")


@pytest.mark.parametrize("flat", [True, False])
def test_files_of_the_layout_folder_are_recognised(tmp_path, flat):
    for id in ("P_1", "P_2"):
        for part in ("adc", "t1ce", "mask"):
            save((tmp_path if flat else tmp_path / id) / f"{id}_{part}.nii.gz")
    save((tmp_path if flat else tmp_path / "P_2") / "P_2_extra.nii.gz")
    words = (
        r"perhaps folder with modalities=\[t1ce,adc\] \(in a run, data.layout=folder 'data.modalities=\[t1ce,adc\]'\)"
    )
    with pytest.raises(DataError, match=words):
        find_cases(tmp_path)


def test_images_directly_in_the_root_suggest_layout_folder(tmp_path):
    save(tmp_path / "A.nii.gz")
    with pytest.raises(
        DataError, match=r"give each case a folder, or give layout=folder \(in a run, data.layout=folder"
    ):
        find_cases(tmp_path, labelled=False)


def test_a_missing_modality_does_not_suggest_another_layout(tmp_path):
    brats(tmp_path, "A")
    (tmp_path / "A" / "A_t1.nii.gz").unlink()
    with pytest.raises(DataError, match=r"A misses A_t1\.nii\.gz"):
        find_cases(tmp_path)


def test_the_command_in_a_message_can_be_pasted(tmp_path):
    root = tmp_path / "my data (1)"
    for id in "AB":
        brats(root, id, label=None)
    with pytest.raises(DataError, match="1 more fault") as caught:
        find_cases(root)
    command = str(caught.value).partition("listed by ")[2].removesuffix(".")
    assert shlex.split(command)[3:] == [f"root={root}", "layout=brats2021"]


def test_every_incomplete_case_is_reported(tmp_path):
    for id in "ABC":
        brats(tmp_path, id)
    (tmp_path / "A" / "A_t1.nii.gz").unlink()
    (tmp_path / "A" / "A_t2.nii.gz").unlink()
    (tmp_path / "C" / "C_seg.nii.gz").rename(tmp_path / "C" / "W39_Segm.nii.gz")
    found = scan(tmp_path)
    assert [case.id for case in found.cases] == ["B"]
    assert [case.modalities for case in found.incomplete] == [("t1ce", "flair"), MODALITIES]
    assert len(found.faults) == 2
    assert "/A misses A_t1.nii.gz, A_t2.nii.gz: add or rename" in found.faults[0]
    assert "/C misses C_seg.nii.gz (its folder also holds W39_Segm.nii.gz): add or rename" in found.faults[1]
    with pytest.raises(DataError, match=r"misses A_t1.*; 1 more fault is listed by python -m memsave\.data\.check"):
        find_cases(tmp_path)


def test_compressed_and_uncompressed_copies_of_a_file_are_reported(tmp_path):
    brats(tmp_path, "A")
    save(tmp_path / "A" / "A_t2.nii")
    with pytest.raises(DataError, match=r"A has several files for one modality or mask, A_t2\.nii and A_t2\.nii\.gz"):
        find_cases(tmp_path)


def test_a_file_without_the_case_id_in_its_name_is_not_used(tmp_path):
    brats(tmp_path, "A")
    (tmp_path / "A" / "A_t1.nii.gz").rename(tmp_path / "A" / "t1.nii.gz")
    with pytest.raises(DataError, match=r"misses A_t1\.nii\.gz \(its folder also holds t1\.nii\.gz\)"):
        find_cases(tmp_path)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"layout": "brats2022"}, r"layout is 'brats2022': choose one of brats2018, .*folder\.$"),
        ({"scheme": "brats"}, r"scheme is 'brats': choose one of .*binary\.$"),
        ({"modalities": ["t1", "pet"]}, r"layout=brats2021 has no modality 'pet': choose from t1, t1ce, t2, flair\.$"),
        ({"modalities": ["t1", "t1"]}, r"modalities are t1, t1: give each of them once\.$"),
        ({"mask": "label"}, r"mask=label is only for layout=folder"),
        ({"layout": "folder"}, r"layout=folder needs modalities, .* modalities=\[t1ce\]\.$"),
        (
            {"layout": "folder", "modalities": ["a"], "mask": "a"},
            r"mask=a is only for layout=folder, and must not be one of its",
        ),
    ],
)
def test_bad_choices_are_reported(tmp_path, settings, sentence):
    brats(tmp_path, "A")
    with pytest.raises(DataError, match=sentence):
        find_cases(tmp_path, **settings)


@pytest.mark.parametrize(
    ("name", "values", "regions"),
    [
        ("brats2018", (0, 1, 2, 4), {"wt": {1, 2, 4}, "tc": {1, 4}, "et": {4}}),
        ("brats2021", (0, 1, 2, 4), {"wt": {1, 2, 4}, "tc": {1, 4}, "et": {4}}),
        ("brats2023", (0, 1, 2, 3), {"wt": {1, 2, 3}, "tc": {1, 3}, "et": {3}}),
        ("brats2024", (0, 1, 2, 3, 4), {"wt": {1, 2, 3}, "tc": {1, 3}, "et": {3}}),
        ("brats2024_rc", (0, 1, 2, 3, 4), {"wt": {1, 2, 3}, "tc": {1, 3}, "et": {3}, "rc": {4}}),
        ("msd", (0, 1, 2, 3), {"wt": {1, 2, 3}, "tc": {2, 3}, "et": {3}}),
        ("binary", (0, 1), {"lesion": {1}}),
    ],
)
def test_schemes_by_hand(name, values, regions):
    scheme = SCHEMES[name]
    assert scheme.values == values and scheme.names == tuple(regions)
    assert {region: set(labels) for region, labels in scheme.regions.items()} == regions


def test_every_layout_and_scheme_is_documented():
    from memsave.data.volumes import check, layouts

    for name in ("brats2018", "brats2021", "brats2023", "brats2024", "msd", "folder"):
        assert name in LAYOUTS and name in check.__doc__ and name.removeprefix("brats") in layouts.__doc__
    assert all(scheme.name in check.__doc__ for scheme in SCHEMES.values())


@pytest.mark.parametrize("found", [[0], [0, 1], [0, 255], [0, 7.0], [1], [0, 1, 255], [0, 3000]])
def test_a_binary_mask_has_one_value(found):
    assert SCHEMES["binary"].fits(found)


@pytest.mark.parametrize("found", [[0, 1, 2], [0, 0.5], [0, -1], [0, float("nan")], [0, 7, 255]])
def test_masks_with_other_values_are_not_binary(found):
    assert not SCHEMES["binary"].fits(found)
