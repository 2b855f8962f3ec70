use std::borrow::Cow;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::OnceLock;

use half::{bf16, f16};
use proptest::prelude::*;
use safetensors::SafeTensors;
use tempfile::TempDir;

use super::*;

const NO_METADATA: BTreeMap<String, String> = BTreeMap::new();

fn f32s(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

fn spec(name: &str, shape: &[usize]) -> TensorSpec {
    TensorSpec { name: name.into(), dtype: DType::F32, shape: shape.into() }
}

/// A checkpoint of four tensors of 8, 16, 8 and 4 bytes, every element its tensor's number.
fn write_four(folder: &Path, max_shard_bytes: usize) -> Result<(), CheckpointError> {
    let specs = [spec("a", &[2]), spec("b", &[2, 2]), spec("c", &[1, 2]), spec("d", &[])];
    let mut number = 0.0;
    write_checkpoint(folder, &specs, max_shard_bytes, |spec| {
        number += 1.0;
        Ok(Cow::Owned(f32s(&vec![number; spec.shape.iter().product()])))
    })
}

fn files(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// A file of this header (its length is put before it) and these bytes.
fn raw(folder: &TempDir, header: &str, data: &[u8]) -> PathBuf {
    let path = folder.path().join("x.safetensors");
    let length = (header.len() as u64).to_le_bytes();
    fs::write(&path, [&length[..], header.as_bytes(), data].concat()).unwrap();
    path
}

/// The whole message but the folder, so that a case shows what a user sees.
fn refused<T>(folder: &Path, result: Result<T, CheckpointError>, message: &str) {
    let found = result.map(|_| ()).unwrap_err().to_string();
    assert_eq!(found.replace(&folder.display().to_string(), "DIR"), message);
}

#[test]
fn what_is_written_is_read_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("t.safetensors");
    let halves: Vec<u8> = [1.5f32, -2.0].iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect();
    let brains: Vec<u8> = [1.5f32, -2.0].iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect();
    let doubles: Vec<u8> = [0.1f64].iter().flat_map(|x| x.to_le_bytes()).collect();
    let longs: Vec<u8> = [-1i64, 1 << 40].iter().flat_map(|x| x.to_le_bytes()).collect();
    let ints = (-7i32).to_le_bytes();
    let singles = f32s(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    let tensors: [(&str, DType, &[usize], &[u8]); 9] = [
        ("bool", DType::Bool, &[3], &[0, 1, 1]),
        ("f16", DType::F16, &[2], &halves),
        ("bf16", DType::BF16, &[2, 1], &brains),
        ("f64", DType::F64, &[], &doubles),
        ("i64", DType::I64, &[2], &longs),
        ("i32", DType::I32, &[1], &ints),
        ("u8", DType::U8, &[2], &[0, 255]),
        ("f32", DType::F32, &[2, 3], &singles),
        ("none", DType::F32, &[0, 7], &[]),
    ];
    write_tensors(&path, tensors, &metadata).unwrap();

    let file = TensorFile::open(&path).unwrap();
    assert_eq!(
        file.names().collect::<Vec<_>>(),
        ["bf16", "bool", "f16", "f32", "f64", "i32", "i64", "none", "u8"]
    );
    assert_eq!(file.metadata(), &metadata);
    for (name, dtype, shape, bytes) in tensors {
        let view = file.tensor(name).unwrap();
        assert_eq!((view.dtype, view.shape, view.bytes), (dtype, shape, bytes));
        assert_eq!(view.bytes.as_ptr() as usize % dtype.bytes(), 0, "{name} lies askew");
    }
    let tensor = |name| file.require(name).unwrap();
    for name in ["f16", "bf16"] {
        assert_eq!(tensor(name).to_f32().unwrap(), [1.5, -2.0]);
        assert_eq!(tensor(name).to_f64().unwrap(), [1.5, -2.0]);
    }
    assert_eq!(tensor("f64").to_f64().unwrap(), [0.1]);
    assert_eq!(tensor("f64").to_f32().unwrap(), [0.1f32]);
    assert_eq!(tensor("i64").to_i64().unwrap(), [-1, 1 << 40]);
    assert_eq!(tensor("i32").to_i64().unwrap(), [-7]);
    assert_eq!(tensor("u8").to_i64().unwrap(), [0, 255]);
    assert_eq!(tensor("bool").to_i64().unwrap(), [0, 1, 1]);
    assert_eq!(tensor("f32").slice_f32(2..5).unwrap(), [3.0, 4.0, 5.0]);

    // The format's own library agrees.
    let bytes = fs::read(&path).unwrap();
    let theirs = SafeTensors::deserialize(&bytes).unwrap();
    for (name, _, shape, bytes) in tensors {
        let view = theirs.tensor(name).unwrap();
        assert_eq!((view.shape(), view.data()), (shape, bytes));
    }
}

#[test]
fn elements_are_only_what_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("t.safetensors");
    let data = f32s(&[1.0, 2.0]);
    write_tensors(&path, [("w", DType::F32, &[2usize][..], &data[..])], &NO_METADATA).unwrap();
    let file = TensorFile::open(&path).unwrap();
    let view = file.tensor("w").unwrap();
    for (error, what) in [
        (view.to_i64().unwrap_err(), "its elements were asked for as integers, which they are not"),
        (view.slice_f32(1..3).unwrap_err(), "2 elements were asked for from element 1 on, but it has 2"),
        (
            view.slice_f32(usize::MAX - 1..usize::MAX).unwrap_err(),
            "1 elements were asked for from element 18446744073709551614 on, but it has 2",
        ),
    ] {
        let expected = format!("{}: tensor `w`, f32[2]: {what}", path.display());
        assert_eq!(error.to_string(), expected);
    }
    refused(folder.path(), file.require("v").map(|_| ()), "DIR/t.safetensors: no tensor `v` here");
}

#[test]
fn a_checkpoint_is_one_file_or_shards_with_an_index() {
    // 8, 16, 8 and 4 bytes; the second of the three shards is full to the last byte.
    for (max_shard_bytes, shards) in [(usize::MAX, 1), (16, 3), (0, 4)] {
        let expected: Vec<String> = match shards {
            1 => vec![SINGLE.into()],
            _ => (1..=shards)
                .map(|n| format!("model-{n:05}-of-{shards:05}.safetensors"))
                .chain([INDEX.into()])
                .collect(),
        };
        let outer = tempfile::tempdir().unwrap();
        let folder = outer.path().join("made/here");
        write_four(&folder, max_shard_bytes).unwrap();
        assert_eq!(files(&folder), expected);
        let checkpoint = Checkpoint::open(&folder).unwrap();
        assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["a", "b", "c", "d"]);
        assert_eq!(checkpoint.require("b").unwrap().to_f32().unwrap(), [2.0; 4]);
        assert_eq!(checkpoint.require("d").unwrap().shape, [0usize; 0]);
        assert_eq!(checkpoint.files[0].metadata()["format"], "pt");
        assert!(Checkpoint::open(folder.join(&expected[0])).is_ok());
    }
}

#[test]
fn shards_replace_an_older_single_file() {
    let folder = tempfile::tempdir().unwrap();
    write_four(folder.path(), usize::MAX).unwrap();
    write_four(folder.path(), 16).unwrap();
    assert!(!files(folder.path()).contains(&SINGLE.to_string()));
    assert_eq!(Checkpoint::open(folder.path()).unwrap().files.len(), 3);
}

#[test]
fn what_fails_leaves_the_folder_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    write_four(folder.path(), 16).unwrap();
    let before = files(folder.path());
    let wrong = write_checkpoint(folder.path(), &[spec("a", &[1]), spec("b", &[3])], 4, |_| {
        Ok::<_, CheckpointError>(Cow::Owned(f32s(&[0.0])))
    });
    refused(
        folder.path(),
        wrong,
        "cannot write tensor `b` to DIR/model-00002-of-00002.safetensors: f32[3] takes 12 bytes, but 4 were given",
    );
    let failing = write_checkpoint(folder.path(), &[spec("a", &[1])], 4, |_| {
        Err(CheckpointError::Read { file: "elsewhere".into(), source: io::Error::other("no") })
    });
    refused(folder.path(), failing, "elsewhere: cannot read: no");
    assert_eq!(files(folder.path()), before);

    let twice = write_checkpoint(folder.path(), &[spec("a", &[1]), spec("a", &[1])], 4, |_| {
        Ok::<_, CheckpointError>(Cow::Owned(f32s(&[0.0])))
    });
    refused(
        folder.path(),
        twice,
        "cannot write tensor `a` to DIR/model.safetensors: a tensor of this name is written already, or the \
         format reserves it",
    );
}

#[test]
fn a_folder_that_cannot_be_written_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    let message = write_four(&file.join("in"), 16).unwrap_err().to_string();
    assert!(message.starts_with(&format!("{}: cannot write the folder itself: ", file.join("in").display())));
    let path = folder.path().join("missing/t.safetensors");
    let message = write_tensors(path, [], &NO_METADATA).unwrap_err().to_string();
    let expected = format!("{}: cannot write t.safetensors: ", folder.path().join("missing").display());
    assert!(message.starts_with(&expected), "{message}");
}

#[test]
fn a_folder_without_weights_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    refused(
        dir,
        Checkpoint::open(dir),
        "DIR: no model.safetensors and no model.safetensors.index.json here; give a folder that holds weights",
    );
    let message = Checkpoint::open(dir.join("none")).unwrap_err().to_string();
    assert!(message.contains("none: cannot read: No such file"), "{message}");
}

#[test]
fn an_index_that_disagrees_with_its_shards_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    write_four(dir, 16).unwrap();
    let index = fs::read_to_string(dir.join(INDEX)).unwrap();
    let first = "model-00001-of-00003.safetensors";
    let at = "DIR/model.safetensors.index.json";
    let changed = |from: &str, to: &str, message: &str| {
        fs::write(dir.join(INDEX), index.replace(from, to)).unwrap();
        refused(dir, Checkpoint::open(dir), message);
        fs::write(dir.join(INDEX), &index).unwrap();
    };
    changed("\"a\"", "\"z\"", &format!("{at}: `z` is said to be in {first}, but is not there"));
    changed(
        &format!("\"a\": \"{first}\""),
        "\"a\": \"model-00002-of-00003.safetensors\", \"x\": \"model-00001-of-00003.safetensors\"",
        &format!("{at}: `a` is said to be in model-00002-of-00003.safetensors, but is in DIR/{first}"),
    );
    changed(
        &format!("\"{first}\""),
        "\"../m.safetensors\"",
        &format!(
            "{at}: `a` is said to be in \"../m.safetensors\", which is not the name of a file beside it"
        ),
    );
    changed("weight_map", "map", &format!("{at}: has no object `weight_map` from tensor names to files"));
    changed(&index, "{", &format!("{at}: not JSON: EOF while parsing an object at line 1 column 1"));

    fs::copy(dir.join(first), dir.join("copy.safetensors")).unwrap();
    changed(
        "\"weight_map\": {",
        "\"weight_map\": {\"x\": \"copy.safetensors\",",
        &format!(
            "tensor `a` is in DIR/copy.safetensors and in DIR/{first}; a checkpoint holds a tensor once"
        ),
    );
    fs::remove_file(dir.join(first)).unwrap();
    refused(
        dir,
        Checkpoint::open(dir),
        &format!("{at}: only 2 of 3 shards are in its folder; missing: {first}"),
    );
}

#[test]
fn a_header_that_lies_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let entry = |dtype: &str, shape: &str, offsets: &str| {
        format!(r#"{{"w":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
    };
    let max = usize::MAX;
    let cases = [
        (
            entry("F32", "[2]", "[0,4]"),
            "tensor `w` is f32[2], which takes 8 bytes, but is said to lie in bytes 0 to 4".into(),
        ),
        (
            entry("F32", "[2]", "[8,0]"),
            "tensor `w` is f32[2], which takes 8 bytes, but is said to lie in bytes 8 to 0".into(),
        ),
        (
            entry("F32", &format!("[{max},{max}]"), "[0,8]"),
            format!(
                "tensor `w` is f32[{max}, {max}], which takes more bytes than can be counted, but is said to lie in bytes 0 to 8"
            ),
        ),
        (
            entry("U8", "[1]", &format!("[{},{max}]", max - 1)),
            format!("tensor `w` is said to end at byte {max}, which no file has"),
        ),
        (
            entry("F32", "[2]", "[4,12]"),
            "tensor `w` is said to begin at byte 4 of the data, but the one before it ends at byte 0".into(),
        ),
        (entry("F32", "[-2]", "[0,8]"), "tensor `w` has no shape of whole numbers in the header".into()),
        (entry("F32", "[2]", "[0]"), "tensor `w` has no data_offsets [begin, end] in the header".into()),
        (r#"{"w":3}"#.into(), "tensor `w` has no dtype in the header".into()),
        (
            entry("F32", "[1]", "[0,4]"),
            "has 70 bytes, but its header describes only 66; not a whole safetensors file".into(),
        ),
        (
            entry("F32", "[3]", "[0,12]"),
            "has 71 bytes, but its header describes 75; it was cut short, copy it again".into(),
        ),
        (
            "[]".into(),
            "its header is not a JSON object: invalid type: sequence, expected a map at line 1 column 0"
                .into(),
        ),
        (
            entry("F8_E4M3", "[8]", "[0,8]"),
            "tensor `w` has dtype F8_E4M3; supported: F64, F32, BF16, F16, I64, I32, U8, BOOL".into(),
        ),
    ];
    for (header, message) in cases {
        let path = raw(&folder, &header, &[0; 8]);
        refused(folder.path(), TensorFile::open(path), &format!("DIR/x.safetensors: {message}"));
    }
    let path = folder.path().join("x.safetensors");
    for (bytes, message) in [
        (&[][..], "has 0 bytes, too few for a safetensors file"),
        (
            &[255; 9][..],
            "says that its header has 18446744073709551615 bytes, but has only 1 after that; not a safetensors file, or cut short",
        ),
    ] {
        fs::write(&path, bytes).unwrap();
        refused(folder.path(), TensorFile::open(&path), &format!("DIR/x.safetensors: {message}"));
    }
}

/// What another library wrote.
#[test]
fn a_reference_case_is_read() {
    let case = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/cases/tiny");
    let weights = Checkpoint::open(&case).unwrap();
    let embedding = weights.require("model.embed_tokens.weight").unwrap();
    assert_eq!(embedding.shape, [199, 45]);
    let expect = TensorFile::open(case.join("expect.safetensors")).unwrap();
    let token = expect.require("input_ids").unwrap().to_i64().unwrap()[0] as usize;
    let row = embedding.slice_f32(token * 45..(token + 1) * 45).unwrap();
    assert_eq!(expect.require("embed_out").unwrap().slice_f32(0..45).unwrap(), row);
    assert_eq!(expect.require("seq_lens").unwrap().to_i64().unwrap(), [37, 12, 25]);
}

/// The bytes of a good file, made once: to be on disk takes long.
fn whole_file() -> Vec<u8> {
    static BYTES: OnceLock<Vec<u8>> = OnceLock::new();
    let made = BYTES.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        write_four(folder.path(), usize::MAX).unwrap();
        fs::read(folder.path().join(SINGLE)).unwrap()
    });
    made.clone()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Cut short or changed anywhere, a file is read in bounds or refused in words.
    #[test]
    fn no_bytes_are_met_with_a_panic(
        cut in any::<prop::sample::Index>(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        whole in any::<bool>(),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(SINGLE);
        let mut bytes = whole_file();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if !whole {
            bytes.truncate(cut.index(bytes.len()));
        }
        fs::write(&path, &bytes).unwrap();
        match Checkpoint::open(folder.path()) {
            Ok(checkpoint) => for name in checkpoint.names() {
                let view = checkpoint.tensor(name).unwrap();
                prop_assert_eq!(view.elements(), view.shape.iter().product::<usize>());
                let _ = (view.to_f32(), view.to_i64());
            },
            Err(e) => prop_assert!(e.to_string().contains(SINGLE)),
        }
    }

    /// The same for an index.
    #[test]
    fn no_index_is_met_with_a_panic(at in any::<prop::sample::Index>(), byte in 32..127u8) {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("m.safetensors"), whole_file()).unwrap();
        let mut index = br#"{"weight_map": {"a": "m.safetensors", "d": "m.safetensors"}}"#.to_vec();
        let at = at.index(index.len());
        index[at] = byte;
        fs::write(folder.path().join(INDEX), &index).unwrap();
        let _ = Checkpoint::open(folder.path());
    }
}
