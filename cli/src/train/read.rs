//! Files of texts or tokens to sequences.

use std::fs;
use std::path::Path;

use anyhow::{Context, anyhow, bail};
use latentc_runtime::checkpoint::{DType, TensorFile};
use latentc_runtime::train::data::Data;
use serde_json::Value;
use tokenizers::Tokenizer;

use super::settings::Settings;
use super::{file, list};
use crate::model::Model;
use crate::progress;
use crate::run::tokenizer;

/// Reads files in the order given.
struct Reader<'a> {
    tokenizer: Option<Tokenizer>,
    /// Where it would be, for messages.
    folder: &'a Path,
    vocab: usize,
    /// The token that ends a document, if there is one.
    end: Option<i32>,
    data: Data,
    /// Pairs of prompt and completion that were cut off.
    cut: usize,
}

/// All sequences of the settings' files, for a model whose tokenizer, if it has one, lies in `folder`.
pub(super) fn read(folder: &Path, model: &Model, settings: &Settings) -> anyhow::Result<Data> {
    let _spinner = progress::spinner("reading data");
    let common = model.config.common();
    let mut reader = Reader {
        tokenizer: tokenizer(folder)?,
        folder,
        vocab: common.vocab_size,
        end: common.eos_token_ids.first().and_then(|&id| i32::try_from(id).ok()),
        data: Data::new(settings.context),
        cut: 0,
    };
    for path in &settings.data {
        reader.file(path).with_context(|| path.display().to_string())?;
    }
    reader.data.cut();
    if reader.data.is_empty() {
        bail!("{}: there is nothing to learn: no text has two tokens", list(&settings.data));
    }
    if reader.cut > 0 {
        eprintln!(
            "note: {} completions do not end within {} tokens and were cut off; --context N reads more",
            reader.cut, settings.context
        );
    }
    Ok(reader.data)
}

impl Reader<'_> {
    fn file(&mut self, path: &Path) -> anyhow::Result<()> {
        match path.extension().and_then(|e| e.to_str()) {
            Some("jsonl") => {
                let text = fs::read_to_string(path).context("cannot read")?;
                for (n, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
                    self.line(line).with_context(|| format!("line {}", n + 1))?;
                }
                Ok(())
            }
            Some("safetensors") => self.tensors(path),
            Some("bin") => {
                let bytes = fs::read(path).context("cannot read")?;
                let wide = if self.vocab <= 1 << 16 { 2 } else { 4 };
                if !bytes.len().is_multiple_of(wide) {
                    bail!("{} bytes are no whole number of token ids of {wide} bytes", bytes.len());
                }
                let id = |b: &[u8]| b.iter().rev().fold(0i64, |id, &b| id << 8 | i64::from(b));
                self.ids(bytes.chunks(wide).map(id), false)
            }
            _ => {
                let text = fs::read_to_string(path).context("cannot read as text in UTF-8")?;
                self.text(&text)
            }
        }
    }

    fn line(&mut self, line: &str) -> anyhow::Result<()> {
        const WANTED: &str =
            "a line is {\"text\": …}, {\"prompt\": …, \"completion\": …} or an array of token ids";
        let value: Value = serde_json::from_str(line).context("no JSON")?;
        match &value {
            Value::Array(ids) => {
                let ids = ids.iter().map(|id| id.as_i64().ok_or_else(|| anyhow!("{id} is no token id")));
                let ids: Vec<i64> = ids.collect::<anyhow::Result<_>>()?;
                self.ids(ids.into_iter(), true)
            }
            Value::Object(map) => {
                let field = |name: &str| map.get(name).and_then(Value::as_str);
                match (field("text"), field("prompt"), field("completion")) {
                    (Some(text), None, None) => self.text(text),
                    (None, Some(prompt), Some(completion)) => self.pair(prompt, completion),
                    _ => bail!("{WANTED}"),
                }
            }
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => bail!("{WANTED}"),
        }
    }

    fn tensors(&mut self, path: &Path) -> anyhow::Result<()> {
        let held = TensorFile::open(path)?;
        let ids = held.require("input_ids")?;
        if !matches!(ids.dtype, DType::I64 | DType::I32) {
            bail!("`input_ids` is {}, token ids are i64 or i32", ids.dtype);
        }
        let columns = ids.shape.last().copied().unwrap_or(0).max(1);
        for row in ids.to_i64()?.chunks(columns) {
            self.ids(row.iter().copied(), true)?;
        }
        Ok(())
    }

    /// A document; where it is one, it ends here.
    fn ids(&mut self, ids: impl Iterator<Item = i64>, ends: bool) -> anyhow::Result<()> {
        let vocab = self.vocab;
        let known = |(n, id): (usize, i64)| match i32::try_from(id) {
            Ok(small) if small >= 0 && (small as usize) < vocab => Ok(small),
            _ => Err(anyhow!("token {n} is {id}, outside of the vocabulary of {vocab}")),
        };
        let ids: Vec<i32> = ids.enumerate().map(known).collect::<anyhow::Result<_>>()?;
        let end = self.end.filter(|&end| ends && ids.last().is_some_and(|&last| last != end));
        self.data.document(ids.into_iter().chain(end));
        Ok(())
    }

    fn text(&mut self, text: &str) -> anyhow::Result<()> {
        let ids = self.encode(text, true)?;
        self.ids(ids.into_iter(), true)
    }

    fn pair(&mut self, prompt: &str, completion: &str) -> anyhow::Result<()> {
        let known = |ids: Vec<i64>| ids.into_iter().map(|id| id as i32).collect::<Vec<_>>();
        let prompt = known(self.encode(prompt, true)?);
        let mut completion = known(self.encode(completion, false)?);
        completion.extend(self.end);
        self.cut += usize::from(self.data.pair(&prompt, &completion));
        Ok(())
    }

    /// Token ids of a text, all within the vocabulary. What begins a text has the tokens that stand before every text.
    fn encode(&self, text: &str, begins: bool) -> anyhow::Result<Vec<i64>> {
        let Some(tokenizer) = &self.tokenizer else {
            bail!(
                "a text cannot be read without {}; give token ids instead",
                file(self.folder, "tokenizer.json")
            );
        };
        let encoded = tokenizer.encode_fast(text, begins).map_err(|e| anyhow!("{e}"))?;
        let ids: Vec<i64> = encoded.get_ids().iter().map(|&id| i64::from(id)).collect();
        match ids.iter().find(|&&id| id as usize >= self.vocab) {
            None => Ok(ids),
            Some(id) => bail!(
                "{} makes token {id}, outside of the vocabulary of {}",
                file(self.folder, "tokenizer.json"),
                self.vocab
            ),
        }
    }
}
