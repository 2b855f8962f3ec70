//! The header of a safetensors file, read and written.
//!
//! A file is the header's length (8 bytes, little-endian), the header (JSON, padded with spaces) and the
//! tensors' bytes one after another, without gaps. A header is untrusted: every number in it is checked
//! against the others and against the length of the file.

use std::collections::BTreeMap;
use std::ops::Range;

use serde_json::{Map, Value, json};

use super::tensor::DType;

/// The first bytes of a file: the length of its header.
const LENGTH_BYTES: usize = 8;

/// A longer header is taken for an accident, as other readers of the format do.
const LONGEST: usize = 100_000_000;

/// What a header says of one tensor.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub(super) dtype: DType,
    pub(super) shape: Vec<usize>,
    /// Where its bytes lie in the file, counted from the file's beginning.
    pub(super) bytes: Range<usize>,
}

/// A header that holds for its file.
#[derive(Debug, Default)]
pub(super) struct Header {
    pub(super) tensors: BTreeMap<String, Entry>,
    pub(super) metadata: BTreeMap<String, String>,
}

/// Why a header is refused.
#[derive(Debug)]
pub(super) enum Refusal {
    Malformed(String),
    UnsupportedDType { tensor: String, dtype: String },
}

impl From<String> for Refusal {
    fn from(what: String) -> Self {
        Refusal::Malformed(what)
    }
}

impl Header {
    /// Reads the header of the whole file `file`, and checks that the tensors fill it.
    pub(super) fn parse(file: &[u8]) -> Result<Self, Refusal> {
        let total = file.len();
        let Some((length, rest)) = file.split_first_chunk::<LENGTH_BYTES>() else {
            return Err(format!("has {total} bytes, too few for a safetensors file").into());
        };
        let length = u64::from_le_bytes(*length);
        let Some(text) = usize::try_from(length).ok().filter(|n| *n <= LONGEST).and_then(|n| rest.get(..n))
        else {
            return Err(format!(
                "says that its header has {length} bytes, but has only {} after that; \
                 not a safetensors file, or cut short",
                rest.len()
            )
            .into());
        };
        let data = LENGTH_BYTES + text.len();
        let json: Map<String, Value> =
            serde_json::from_slice(text).map_err(|e| format!("its header is not a JSON object: {e}"))?;

        let mut header = Header::default();
        for (name, value) in json {
            if name == "__metadata__" {
                let texts = value.as_object().into_iter().flatten();
                let texts = texts.filter_map(|(k, v)| Some((k.clone(), v.as_str()?.to_string())));
                header.metadata = texts.collect();
            } else {
                let entry = Entry::parse(&name, &value, data)?;
                header.tensors.insert(name, entry);
            }
        }
        header.check_layout(data, total)?;
        Ok(header)
    }

    /// Tensor after tensor, from the end of the header to the end of the file.
    fn check_layout(&self, data: usize, total: usize) -> Result<(), String> {
        let mut order: Vec<(&String, &Entry)> = self.tensors.iter().collect();
        order.sort_by_key(|(_, entry)| (entry.bytes.start, entry.bytes.end));
        let mut end = data;
        for (name, entry) in order {
            if entry.bytes.start != end {
                let (found, expected) = (entry.bytes.start - data, end - data);
                return Err(format!(
                    "tensor `{name}` is said to begin at byte {found} of the data, but the one before it ends \
                     at byte {expected}"
                ));
            }
            end = entry.bytes.end;
        }
        match total.cmp(&end) {
            std::cmp::Ordering::Equal => Ok(()),
            std::cmp::Ordering::Less => Err(format!(
                "has {total} bytes, but its header describes {end}; it was cut short, copy it again"
            )),
            std::cmp::Ordering::Greater => Err(format!(
                "has {total} bytes, but its header describes only {end}; not a whole safetensors file"
            )),
        }
    }

    /// The bytes that come before the data. `tensors` follow each other in this order.
    pub(super) fn write<'a>(
        tensors: impl Iterator<Item = (&'a str, DType, &'a [usize])>,
        metadata: &BTreeMap<String, String>,
    ) -> Vec<u8> {
        let mut map = Map::new();
        if !metadata.is_empty() {
            map.insert("__metadata__".into(), json!(metadata));
        }
        let mut begin = 0;
        for (name, dtype, shape) in tensors {
            let end = begin + dtype.bytes() * shape.iter().product::<usize>();
            let entry = json!({"dtype": dtype.name(), "shape": shape, "data_offsets": [begin, end]});
            map.insert(name.into(), entry);
            begin = end;
        }
        let mut text = Value::Object(map).to_string().into_bytes();
        // The data begins at a multiple of 8, so that a reader may look at it in place.
        text.resize(text.len().next_multiple_of(8), b' ');
        let mut out = (text.len() as u64).to_le_bytes().to_vec();
        out.extend(text);
        out
    }
}

impl Entry {
    fn parse(name: &str, value: &Value, data: usize) -> Result<Self, Refusal> {
        let whole = |v: &Value| v.as_u64().and_then(|n| usize::try_from(n).ok());
        let wholes = |key: &str| -> Option<Vec<usize>> {
            value.get(key).and_then(Value::as_array)?.iter().map(whole).collect()
        };
        let bad = |what: String| format!("tensor `{name}` {what}");

        let Some(spelled) = value.get("dtype").and_then(Value::as_str) else {
            return Err(bad("has no dtype in the header".into()).into());
        };
        let Some(dtype) = DType::from_name(spelled) else {
            return Err(Refusal::UnsupportedDType { tensor: name.into(), dtype: spelled.into() });
        };
        let Some(shape) = wholes("shape") else {
            return Err(bad("has no shape of whole numbers in the header".into()).into());
        };
        let Some([begin, end]) = wholes("data_offsets").and_then(|v| <[usize; 2]>::try_from(v).ok()) else {
            return Err(bad("has no data_offsets [begin, end] in the header".into()).into());
        };
        let needed = dtype.bytes_of(&shape);
        if needed.is_none() || end.checked_sub(begin) != needed {
            let needed = needed.map_or("more bytes than can be counted".into(), |n| format!("{n} bytes"));
            return Err(bad(format!(
                "is {dtype}{shape:?}, which takes {needed}, but is said to lie in bytes {begin} to {end}"
            ))
            .into());
        }
        let Some(bytes) = data.checked_add(begin).zip(data.checked_add(end)).map(|(b, e)| b..e) else {
            return Err(bad(format!("is said to end at byte {end}, which no file has")).into());
        };
        Ok(Entry { dtype, shape, bytes })
    }
}
