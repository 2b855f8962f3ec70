//! A peer: candle's DeepSeek-V2 on the CPU. `candle-peer MODEL_DIR f32|bf16`; see `../README.md` for what it is asked.

use std::io::{self, BufRead, Write};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use candle_core::{D, DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::deepseek2::{DeepSeekV2, DeepSeekV2Config};
use serde::Deserialize;
use serde_json::{Value, json};

#[derive(Deserialize)]
#[serde(tag = "op", rename_all = "lowercase")]
enum Request {
    Generate { ids: Vec<Vec<u32>>, steps: usize },
    Peak,
}

fn read(model: &mut DeepSeekV2, rows: &[Vec<u32>], past: usize) -> Result<Vec<u32>> {
    let len = rows.first().context("no text")?.len();
    let ids = Tensor::from_vec(rows.concat(), (rows.len(), len), &Device::Cpu)?;
    let logits = model.forward(&ids, past)?;
    let logits = if logits.rank() == 3 { logits.narrow(1, logits.dim(1)? - 1, 1)?.squeeze(1)? } else { logits };
    Ok(logits.argmax(D::Minus1)?.to_vec1()?)
}

fn generate(model: &mut DeepSeekV2, rows: &[Vec<u32>], steps: usize) -> Result<Value> {
    model.clear_kv_cache();
    let len = rows.first().context("no text")?.len();
    let start = Instant::now();
    let mut next = read(model, rows, 0)?;
    let prefill = start.elapsed().as_secs_f64();
    let (mut tokens, mut decode) = (vec![next.clone()], Vec::new());
    for step in 0..steps {
        let start = Instant::now();
        let rows: Vec<Vec<u32>> = next.iter().map(|&id| vec![id]).collect();
        next = read(model, &rows, len + step)?;
        decode.push(start.elapsed().as_secs_f64());
        tokens.push(next.clone());
    }
    Ok(json!({ "prefill": prefill, "decode": decode, "tokens": tokens }))
}

fn peak() -> Result<Value> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
    let kib = line.and_then(|l| l.split_whitespace().next()).context("no VmHWM in /proc/self/status")?;
    Ok(json!({ "bytes": kib.parse::<u64>()? * 1024 }))
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().collect();
    let [_, folder, dtype] = &args[..] else { bail!("usage: candle-peer MODEL_DIR f32|bf16") };
    let dtype = match dtype.as_str() {
        "f32" => DType::F32,
        "bf16" => DType::BF16,
        other => bail!("unknown type {other}"),
    };
    let config: DeepSeekV2Config = serde_json::from_str(&std::fs::read_to_string(format!("{folder}/config.json"))?)?;
    let file = format!("{folder}/model.safetensors");
    // SAFETY: nobody writes to the file meanwhile.
    let weights = unsafe { VarBuilder::from_mmaped_safetensors(&[file], dtype, &Device::Cpu)? };
    let mut model = DeepSeekV2::new(&config, weights)?;
    println!("{}", json!({ "name": "candle-transformers 0.11" }));
    for line in io::stdin().lock().lines() {
        let answer = match serde_json::from_str(&line?)? {
            Request::Generate { ids, steps } => generate(&mut model, &ids, steps)?,
            Request::Peak => peak()?,
        };
        println!("{answer}");
        io::stdout().flush()?;
    }
    Ok(())
}
