//! `train`: exact resumption, interrupts, kills, data of every kind.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use latentc_ir::tensor::SplitMix;
use serde_json::{Value, json};

use crate::{DType, Tensors, case, error, f32s, files, i64s, json, names, ok, says, scratch, words, write};

/// Documents that can be learned: each goes up by a step of its own, modulo the vocabulary of the case `tiny`.
fn documents(seed: u64) -> Vec<Vec<i64>> {
    let mut rng = SplitMix(seed);
    let one = |rng: &mut SplitMix| {
        let (start, step, len) = (rng.below(199) as i64, 1 + rng.below(3) as i64, 5 + rng.below(30) as i64);
        (0..len).map(|n| (start + n * step) % 199).collect()
    };
    (0..24).map(|_| one(&mut rng)).collect()
}

fn lines(folder: &Path) -> PathBuf {
    let file = folder.join("data.jsonl");
    let text: Vec<_> = documents(1).iter().map(|ids| json!(ids).to_string()).collect();
    fs::write(&file, text.join("\n")).expect("the folder is ours");
    file
}

/// What a run must leave equal: all files of the last checkpoint, and what metrics say but for times.
fn left(out: &Path) -> (Vec<(PathBuf, Vec<u8>)>, Vec<Value>) {
    let checkpoints = out.join("checkpoints");
    let last = names(&checkpoints).pop().expect("there is one");
    let files = files(&checkpoints.join(last)).into_iter().collect();
    let text = fs::read_to_string(out.join("metrics.jsonl")).expect("there are metrics");
    let record = |line: &str| {
        let mut record: Value = serde_json::from_str(line).expect("a line is whole");
        record.as_object_mut().expect("an object").remove("tokens_per_s");
        record
    };
    (files, text.lines().map(record).collect())
}

fn steps(out: &Path) -> usize {
    fs::read_to_string(out.join("metrics.jsonl")).map_or(0, |text| text.lines().count())
}

/// Starts a command and leaves it alone.
fn start(line: &str, paths: &[&Path]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_latentc"));
    command.args(words(line, paths)).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().expect("the binary starts")
}

const NUMBERS: &str = "--steps 6 --context 12 --batch 5 --first-batch 2 --batch-ramp 3 --micro-batch 2 --rate 3e-3 \
                       --warmup 2 --seed 9 --valid 0.2 --valid-every 2 --save-every 2 \
                       --expert-balance 0.03 --device-balance 0.5 --communication-balance 0.2 --drop-tokens --exempt 0.3";

#[test]
fn a_resumed_run_is_the_uninterrupted_one() {
    let folder = scratch();
    let [once, twice, model] = ["once", "twice", "model"].map(|n| folder.path().join(n));
    let data = lines(folder.path());
    // Weights that are stored narrower than they are updated.
    ok("init {} -o {} --dtype bf16 --seed 5", &[&case("tiny"), &model]);
    let report = json(&format!("train {{}} --data {{}} -o {{}} {NUMBERS} --json"), &[&model, &data, &once]);
    assert_eq!((&report["step"], &report["interrupted"]), (&json!(6), &json!(false)));
    ok(&format!("train {{}} --data {{}} -o {{}} {NUMBERS} --until 3"), &[&model, &data, &twice]);
    let said = ok("train --resume {}", &[&twice]);
    assert!(said.contains("step 6 of 6"), "{said}");

    let (files, metrics) = left(&once);
    let (also, said) = left(&twice);
    assert_eq!(said, metrics);
    for ((name, a), (_, b)) in files.iter().zip(&also) {
        assert!(a == b, "{}", name.display());
    }
    let numbers = |key: &str| metrics.iter().filter_map(|r| r[key].as_f64()).collect::<Vec<_>>();
    assert_eq!(numbers("sequences"), [2.0, 3.0, 4.0, 5.0, 5.0, 5.0]);
    // The rate falls after 14.4 of 24 sequences: 14 are seen before the fifth step, 19 before the sixth.
    let rates = [0.5, 1.0, 1.0, 1.0, 1.0, 0.316].map(|x| x * 3e-3);
    assert!(numbers("rate").iter().zip(rates).all(|(a, b)| (a - b).abs() < 1e-9), "{:?}", numbers("rate"));
    assert_eq!(numbers("valid_loss").len(), 3);
    for r in &metrics {
        let number = |key: &str| r[key].as_f64().unwrap_or_else(|| panic!("{key} is a number: {r}"));
        let [e, d, c] = ["expert", "device", "communication"].map(|n| number(&format!("{n}_balance")));
        let (objective, balance) = (number("objective"), 0.03 * e + 0.5 * d + 0.2 * c);
        assert!(balance > 1.4 && (objective - number("loss") - balance).abs() < 1e-5, "{r}");
        let dropped = number("dropped");
        assert!((0.0..0.5).contains(&dropped), "{r}");
        // Of the two layers with experts.
        let layers: Vec<f64> =
            r["violations"].as_array().expect("a list").iter().flat_map(Value::as_f64).collect();
        assert_eq!(layers.len(), 2);
        assert_eq!(number("max_violation"), layers[0].max(layers[1]));
        assert_eq!(number("mean_violation"), (layers[0] + layers[1]) / 2.0);
    }

    // OUT is a model folder, and shows the last checkpoint.
    assert_eq!(names(&once.join("checkpoints")), ["00000004", "00000006"]);
    let shown = [
        "checkpoints",
        "config.json",
        "loss.svg",
        "metrics.jsonl",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ];
    assert_eq!(names(&once), shown);
    for name in ["model.safetensors", "optimizer.safetensors", "state.json"] {
        let [a, b] =
            [once.join(name), once.join("checkpoints/00000006").join(name)].map(|f| fs::read(f).unwrap());
        assert!(a == b, "{name}");
    }
    let kinds: Vec<_> = crate::tensors(&once.join("model.safetensors")).into_values().map(|t| t.0).collect();
    assert!(kinds.iter().all(|&dtype| dtype == DType::BF16));
    assert!(numbers("dropped").iter().any(|&part| part > 0.0), "{:?}", numbers("dropped"));
    let drawn = fs::read_to_string(once.join("loss.svg")).unwrap();
    assert!(["validation", "busiest expert"].iter().all(|name| drawn.contains(name)), "{drawn}");
    // What was asked for is part of the model from now on.
    let config: Value = serde_json::from_slice(&fs::read(once.join("config.json")).unwrap()).unwrap();
    let said =
        ["aux_loss_alpha", "device_loss_alpha", "device_capacity_factor"].map(|key| config[key].clone());
    assert_eq!(said, [0.03, 0.5, 1.0].map(Value::from));
    ok("run {} --prompt-ids 5,6 --steps 2", &[&once]);
}

#[test]
fn it_learns() {
    let folder = scratch();
    let (data, out) = (folder.path().join("one.jsonl"), folder.path().join("out"));
    fs::write(&data, "[3, 1, 4, 15, 92, 65, 35, 89, 79, 32, 38]").expect("the folder is ours");
    let line = "train {} --data {} -o {} --steps 40 --batch 1 --rate 1e-2 --save-every 0 --json";
    let report = json(line, &[&case("tiny"), &data, &out]);
    let loss = report["loss"].as_f64().expect("a number");
    assert!(loss < 0.5, "{loss}");
    // One sequence is not split.
    assert_eq!(report["valid_loss"], Value::Null);
    assert_eq!(ok("run {} --prompt-ids 3,1,4,15 --steps 5", &[&out]).trim(), "92 65 35 89 79");
}

#[test]
fn parts_of_a_batch_add_up() {
    let folder = scratch();
    let [whole, parts] = ["whole", "parts"].map(|n| folder.path().join(n));
    let data = lines(folder.path());
    let line =
        "train {} --data {} -o {} --steps 1 --batch 4 --context 12 --valid 0 --clip 1e9 --expert-balance 0.5";
    ok(line, &[&case("tiny"), &data, &whole]);
    ok(&format!("{line} --micro-batch 1"), &[&case("tiny"), &data, &parts]);
    let file = |out: &Path| out.join("optimizer.safetensors");
    for name in crate::tensors(&file(&whole)).keys().filter(|name| name.starts_with("m.")) {
        let [a, b] = [&whole, &parts].map(|out| f32s(&file(out), name).0);
        let largest = a.iter().fold(0f32, |most, x| most.max(x.abs()));
        let off = a.iter().zip(&b).fold(0f32, |most, (a, b)| most.max((a - b).abs()));
        assert!(off <= 1e-4 * largest, "{name}: {off:e} of {largest:e}");
    }
    // Means over sequences do, too, and tokens are counted over all of them.
    let [(_, whole), (_, parts)] = [&whole, &parts].map(|out| left(out));
    for key in ["objective", "loss", "expert_balance", "device_balance", "communication_balance"] {
        let [a, b] = [&whole, &parts].map(|records| records[0][key].as_f64().expect("a number"));
        assert!((a - b).abs() < 1e-5 * a, "{key}: {a} and {b}");
    }
    assert_eq!(whole[0]["violations"], parts[0]["violations"]);
}

/// What is kept instead of computed again changes time and memory; values but for the last bits.
#[test]
fn a_memory_budget_is_kept() {
    let folder = scratch();
    let data = lines(folder.path());
    let line = "report {} --graph train --target host --batch 3 --train-length 12 --json";
    let told =
        |more: &str| json(&format!("{line} {more}"), &[&case("tiny")])["models"][0]["steps"][0].clone();
    let (least, most) = (told("--memory-budget least"), told(""));
    let number = |report: &Value, key: &str| report[key].as_f64().expect("a number");
    let count = |report: &Value, key: &str| report[key].as_array().expect("a list").len();
    assert_eq!([count(&least, "kept"), count(&most, "again")], [0, 0]);
    assert!(number(&least, "again_flops") > 0.0 && number(&most, "again_flops") == 0.0);
    let (from, to) = (number(&least, "peak"), number(&most, "peak"));
    assert!(from < to, "{from} and {to}");
    assert_eq!(told("--memory-budget 1TiB"), most);
    let budget = ((from + to) / 2.0) as u64;
    let between = told(&format!("--memory-budget {budget}"));
    assert!(number(&between, "peak") <= budget as f64, "{between} of {budget}");
    assert!(count(&between, "kept") > 0 && count(&between, "again") > 0, "{between}");

    let line = "train {} --data {} -o {} --steps 3 --batch 3 --context 12 --valid 0 --json";
    let loss = |more: &str, out: &str| {
        json(&format!("{line} {more}"), &[&case("tiny"), &data, &folder.path().join(out)])["loss"]
            .as_f64()
            .unwrap()
    };
    let (a, b) = (loss("--memory-budget least", "least"), loss("", "most"));
    assert!((a - b).abs() < 1e-4 * a, "{a} and {b}");
    let small =
        error(&format!("{line} --memory-budget 1MiB"), &[&case("tiny"), &data, &folder.path().join("none")]);
    says(&small, &["--memory-budget", "at the least", "the budget is 1048576", "fewer or shorter sequences"]);
}

/// As trained with and without the loss, from the same weights on the same texts: means of the last ten steps.
#[test]
fn the_balance_loss_balances() {
    let folder = scratch();
    let (data, model) = (lines(folder.path()), folder.path().join("model"));
    ok("init {} -o {} --seed 5", &[&case("tiny"), &model]);
    let trained = |weight: &str| {
        let out = folder.path().join(weight);
        let line =
            "train {} --data {} -o {} --steps 30 --context 16 --batch 4 --rate 1e-2 --valid 0 --save-every 0";
        ok(&format!("{line} --expert-balance {weight}"), &[&model, &data, &out]);
        let last = left(&out).1.split_off(20);
        let mean = |key: &str| last.iter().flat_map(|r| r[key].as_f64()).sum::<f64>() / 10.0;
        // With equal work for all experts, the loss of each of two layers is 1.
        (mean("expert_balance") - 2.0, mean("mean_violation"))
    };
    let (off, on) = (trained("0"), trained("0.1"));
    println!("without the loss {off:?}, with it {on:?}");
    assert!(on.0 < 0.5 * off.0 && on.1 < 0.9 * off.1, "{on:?} is not much less than {off:?}");
}

#[test]
fn data_of_every_kind_are_the_same_tokens() {
    let folder = scratch();
    let at = |name: &str| folder.path().join(name);
    // Rows of one length, each with the token that ends a text.
    let rows: Vec<Vec<i64>> =
        (0..6).map(|r| (0..9).map(|n| 2 + (r * 31 + n * 7) % 190).chain([1]).collect()).collect();
    let text =
        |row: &Vec<i64>| json!({"text": row[..9].iter().map(i64::to_string).collect::<Vec<_>>().join(" ")});
    let joined = |lines: Vec<Value>| lines.iter().map(Value::to_string).collect::<Vec<_>>().join("\n\n");
    fs::write(at("ids.jsonl"), joined(rows.iter().map(|row| json!(row)).collect())).unwrap();
    fs::write(at("texts.jsonl"), joined(rows.iter().map(text).collect())).unwrap();
    let all: Vec<i64> = rows.concat();
    let tensor = (DType::I64, vec![6, 10], i64s(&all));
    write(&at("ids.safetensors"), &Tensors::from([("input_ids".to_owned(), tensor)]));
    let model = speaking(folder.path());
    let losses = ["ids.jsonl", "texts.jsonl", "ids.safetensors"].map(|name| {
        let out = at(&format!("of {name}"));
        let line = "train {} --data {} -o {} --steps 2 --batch 3 --context 12 --valid 0 --json";
        json(line, &[&model, &at(name), &out])["loss"].clone()
    });
    assert!(losses[0].is_f64() && losses.iter().all(|loss| *loss == losses[0]), "{losses:?}");

    // One document of two bytes a token, and the same as text.
    let bytes: Vec<u8> = all.iter().flat_map(|&id| (id as u16).to_le_bytes()).collect();
    fs::write(at("ids.bin"), bytes).unwrap();
    fs::write(at("words.txt"), all[..59].iter().map(i64::to_string).collect::<Vec<_>>().join("\n")).unwrap();
    let losses = ["ids.bin", "words.txt"].map(|name| {
        let out = at(&format!("of {name}"));
        let line = "train {} --data {} -o {} --steps 2 --batch 3 --context 12 --valid 0 --json";
        json(line, &[&model, &at(name), &out])["loss"].clone()
    });
    assert_eq!(losses[0], losses[1]);
}

/// The case `tiny` with a tokenizer that writes token n as the number n.
fn speaking(folder: &Path) -> PathBuf {
    let model = folder.join("speaking");
    fs::create_dir(&model).expect("the folder is ours");
    for name in ["config.json", "model.safetensors"] {
        fs::copy(case("tiny").join(name), model.join(name)).expect("the case has it");
    }
    let vocab: serde_json::Map<_, _> = (0..199).map(|id| (id.to_string(), json!(id))).collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "0"},
    });
    fs::write(model.join("tokenizer.json"), tokenizer.to_string()).expect("the folder is ours");
    model
}

#[test]
fn only_completions_are_learned() {
    let folder = scratch();
    let at = |name: &str| folder.path().join(name);
    let model = speaking(folder.path());
    let pairs: [(&[i64], &[i64]); 2] = [(&[5, 6, 7], &[8, 9]), (&[20, 30], &[40, 50, 60, 70])];
    let text = |ids: &[i64]| ids.iter().map(i64::to_string).collect::<Vec<_>>().join(" ");
    let line = |(p, c): &(&[i64], &[i64])| json!({"prompt": text(p), "completion": text(c)}).to_string();
    fs::write(at("pairs.jsonl"), pairs.iter().map(line).collect::<Vec<_>>().join("\n")).unwrap();
    let line = "train {} --data {} -o {} --steps 1 --batch 2 --context 12 --valid 0 --json";
    let loss = json(line, &[&model, &at("pairs.jsonl"), &at("out")])["loss"].as_f64().expect("a number");

    // The same from logits: what each completion, and the token that ends it, costs.
    let texts = pairs.map(|(p, c)| [p, c, &[1]].concat());
    let longest = texts.iter().map(Vec::len).max().unwrap();
    let (mut ids, mut mask) = (vec![], vec![]);
    for text in &texts {
        let padding = vec![0; longest - text.len()];
        mask.extend([vec![1; text.len()], padding.clone()].concat());
        ids.extend([text.clone(), padding].concat());
    }
    let tensor = |x: &[i64]| (DType::I64, vec![2, longest], i64s(x));
    let inputs = [("input_ids".to_owned(), tensor(&ids)), ("attention_mask".to_owned(), tensor(&mask))];
    write(&at("in.safetensors"), &Tensors::from(inputs));
    ok("eval {} --inputs {} --out {}", &[&model, &at("in.safetensors"), &at("logits.safetensors")]);
    let (logits, shape) = f32s(&at("logits.safetensors"), "logits");
    let (mut sum, mut count) = (0.0, 0.0);
    for (r, ((prompt, _), text)) in pairs.iter().zip(&texts).enumerate() {
        for p in prompt.len() - 1..text.len() - 1 {
            let row = &logits[(r * longest + p) * shape[2]..][..shape[2]];
            let all = row.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
            sum += all - f64::from(row[text[p + 1] as usize]);
            count += 1.0;
        }
    }
    assert!((loss - sum / count).abs() < 1e-5, "{loss}, not {}", sum / count);
}

#[cfg(unix)]
#[test]
fn an_interrupt_writes_a_checkpoint() {
    let folder = scratch();
    let [once, twice] = ["once", "twice"].map(|n| folder.path().join(n));
    let (tiny, data) = (case("tiny"), lines(folder.path()));
    let line = "train {} --data {} -o {} --steps 400 --context 12 --batch 2 --valid 0 --save-every 0";
    let child = start(line, &[&tiny, &data, &twice]);
    let begun = Instant::now();
    while steps(&twice) < 2 {
        assert!(begun.elapsed() < Duration::from_secs(300), "it makes steps");
        sleep(Duration::from_millis(5));
    }
    let signal =
        Command::new("kill").args(["-INT", &child.id().to_string()]).status().expect("there is kill");
    assert!(signal.success());
    let out = child.wait_with_output().expect("it ends");
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(out.status.success() && said.contains("interrupted, step"), "{said}");
    assert!(said.contains("to go on: latentc train --resume"), "{said}");
    let made = steps(&twice);
    assert!(made < 400);
    let saved: Value = serde_json::from_slice(&fs::read(twice.join("state.json")).unwrap()).unwrap();
    assert_eq!(saved["step"], made);

    let end = (made + 2).to_string();
    ok("train --resume {} --until {}", &[&twice, Path::new(&end)]);
    ok(&format!("{line} --until {end}"), &[&tiny, &data, &once]);
    assert!(left(&once) == left(&twice));
}

/// Kills a training again and again, each time at a random moment, while it writes a checkpoint after every step. Set
/// LATENTC_KILLS for more kills.
#[test]
fn kills_lose_nothing() {
    let kills: u64 = std::env::var("LATENTC_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(10);
    let folder = scratch();
    let [once, killed] = ["once", "killed"].map(|n| folder.path().join(n));
    let (tiny, data) = (case("tiny"), lines(folder.path()));
    let line = "train {} --data {} -o {} --steps 100000 --context 4 --batch 1 --valid 0 --save-every 1";
    let last = |out: &Path| {
        let found = fs::read_dir(out.join("checkpoints")).into_iter().flatten();
        found.filter_map(|e| e.ok()?.file_name().to_str()?.parse::<u64>().ok()).max()
    };
    let mut rng = SplitMix(u64::from(std::process::id()));
    let mut most: Option<u64> = None;
    for n in 0..kills {
        let mut child = match most {
            None => start(line, &[&tiny, &data, &killed]),
            Some(_) => start("train --resume {}", &[&killed]),
        };
        // Some are killed as they begin, the others at any moment behind a new checkpoint: then they write the next ones.
        let begun = Instant::now();
        while n % 4 > 0 && last(&killed) <= most && begun.elapsed() < Duration::from_secs(60) {
            sleep(Duration::from_millis(2));
        }
        sleep(Duration::from_micros(rng.below(150_000)));
        child.kill().expect("it runs");
        child.wait().expect("it ends");
        let now = last(&killed);
        assert!(now >= most, "step {most:?} was saved, now {now:?} is the last");
        most = now;
        // What is there is whole at any moment.
        if killed.join("model.safetensors").exists() && n % 3 == 0 {
            ok("run {} --prompt-ids 5,6 --steps 1", &[&killed]);
        }
    }
    let most = most.filter(|&most| most > 0).expect("it was killed behind its first step");
    let end = (most + 2).to_string();
    ok("train --resume {} --until {}", &[&killed, Path::new(&end)]);
    ok(&format!("{line} --until {end}"), &[&tiny, &data, &once]);
    assert!(left(&once) == left(&killed));
    let hidden = |folder: &Path| names(folder).iter().any(|name| name.starts_with('.'));
    assert!(!hidden(&killed) && !hidden(&killed.join("checkpoints")), "nothing temporary is left");
}

#[test]
fn what_cannot_be_learned_is_said() {
    let folder = scratch();
    let at = |name: &str| folder.path().join(name);
    let tiny = case("tiny");
    let refused = |name: &str, text: &str| {
        fs::write(at(name), text).expect("the folder is ours");
        error("train {} --data {} -o {} --steps 1", &[&tiny, &at(name), &at("out")])
    };
    says(&refused("a.txt", "words"), &["a.txt", "tokenizer.json", "token ids"]);
    says(
        &refused("a.jsonl", "[1, 2]\n[3, 199]"),
        &["a.jsonl", "line 2", "token 1 is 199", "vocabulary of 199"],
    );
    says(&refused("b.jsonl", "{\"text\": 3}"), &["b.jsonl", "line 1", "prompt", "array of token ids"]);
    says(&refused("c.jsonl", "[1"), &["c.jsonl", "line 1", "no JSON"]);
    says(&refused("d.jsonl", "[]\n"), &["d.jsonl", "nothing to learn"]);
    says(&refused("e.bin", "abc"), &["e.bin", "3 bytes", "2 bytes"]);
    says(&refused("f.safetensors", ""), &["f.safetensors"]);
    assert!(!at("out").exists(), "nothing is made of an error");

    let data = lines(folder.path());
    let line = "train {} --data {} -o {} --steps 1";
    let wrong = |more: &str| error(&format!("{line} {more}"), &[&tiny, &data, &at("out")]);
    says(&wrong("--context 257"), &["--context is 257", "256 positions"]);
    says(&wrong("--rate nan"), &["--rate is NaN"]);
    says(&wrong("--batch 0"), &["--batch is 0"]);
    says(&wrong("--valid 0.6"), &["--valid is 0.6", "at most 0.5"]);
    says(&wrong("--expert-balance inf"), &["--expert-balance is inf", "finite"]);
    says(&wrong("--devices 4"), &["--devices is 4", "15 experts"]);
    says(&wrong("--devices 1 --device-balance 0.1"), &["--device-balance", "one device", "--devices"]);
    let dense = |more: &str| error(&format!("{line} {more}"), &[&case("tiny-llama"), &data, &at("out")]);
    says(&dense("--communication-balance 0.1"), &["--communication-balance", "no layers with experts"]);
    says(&wrong("--devices 1 --drop-tokens"), &["--drop-tokens", "one device", "--drop-tokens=0"]);
    says(&wrong("--drop-tokens=-1"), &["--drop-tokens is -1", "at least 0"]);
    says(&wrong("--exempt 2"), &["--exempt is 2", "at most 1"]);
    says(&dense("--drop-tokens"), &["--drop-tokens", "no layers with experts"]);
    says(&dense("--devices 2"), &["--devices", "no layers with experts"]);
    assert!(!at("out").exists(), "nothing is made of an error");
    says(&error("train --resume {}", &[&at("out")]), &["no checkpoint here"]);
    let line = "train {} --data {} -o {} --steps 9 --rate 1e30 --warmup 0 --json";
    let diverged = error(line, &[&tiny, &data, &at("out")]);
    says(&diverged, &["the loss is", "lower rate"]);
    says(&error(line, &[&tiny, &data, &at("out")]), &["not empty", "--resume"]);
    fs::write(&data, "[1, 2, 3]").unwrap();
    says(&error("train --resume {}", &[&at("out")]), &["not those", "data.jsonl"]);
}
