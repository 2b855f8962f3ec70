//! What is wrong on the command line, and what the answer says.

use std::fs;
use std::path::Path;

use crate::{DType, Tensors, case, changed, error, i64s, latentc, says, scratch, write};

#[test]
fn a_model_that_is_not_there() {
    for command in
        ["params gpt-2", "dump gpt-2", "compile gpt-2 --target host -o /proc/x", "init gpt-2 -o /proc/x"]
    {
        says(
            &error(command, &[]),
            &["unknown model `gpt-2`", "no such folder or file", "deepseek-v2", "deepseek-67b"],
        );
    }
    let none = Path::new("/none");
    for line in ["run {} --prompt-ids 1 --steps 1", "eval {} --inputs /none --out /none"] {
        says(&error(line, &[none]), &["/none: there is no such folder"]);
    }
    let folder = scratch();
    says(&error("params {}", &[folder.path()]), &["config.json: cannot read", "No such file"]);
    says(&error("run {} --prompt-ids 1 --steps 1", &[folder.path()]), &["config.json: cannot read"]);
    let file = case("tiny").join("config.json");
    says(&error("run {} --prompt-ids 1 --steps 1", &[&file]), &["config.json: not a folder"]);
}

#[test]
fn a_prompt_that_cannot_be_continued() {
    let tiny = case("tiny");
    let run = |prompt: &str, rest: &str| {
        let model = tiny.to_string_lossy();
        let args = ["run", &model, "--prompt-ids", prompt].into_iter().chain(rest.split(' '));
        crate::error_of(&latentc(args), rest)
    };
    says(&run("", "--steps 1"), &["the prompt is empty"]);
    says(&run("1,x,3", "--steps 1"), &["`x` is no token id"]);
    says(&run("1,,3", "--steps 1"), &["`` is no token id"]);
    says(&run("1,99999999999", "--steps 1"), &["`99999999999` is no token id"]);
    says(&run("1,199", "--steps 1"), &["token id 199 of the prompt", "vocabulary of 199"]);
    says(&run("-1", "--steps 1"), &["token id -1 of the prompt"]);
    says(&run("1,2", "--steps 255"), &["2 tokens and 255 steps", "256 positions", "max_position_embeddings"]);
    says(&run("1,2", "--steps 18446744073709551615"), &["256 positions"]);
    for t in ["-1", "nan", "inf"] {
        says(&run("1", &format!("--steps 1 --temperature {t}")), &["--temperature is", "0 or more"]);
    }
    for p in ["0", "1.1", "-0.5", "nan"] {
        says(&run("1", &format!("--steps 1 --top-p {p}")), &["--top-p is", "at most 1"]);
    }
    let text = error("run {} --prompt hello --steps 1", &[&tiny]);
    says(&text, &["no tokenizer.json here", "--prompt-ids"]);
}

#[test]
fn a_tokenizer_that_is_none() {
    let folder = changed(|_| {}, |_| {});
    fs::write(folder.path().join("tokenizer.json"), "{}").expect("the folder is ours");
    says(&error("run {} --prompt a --steps 1", &[folder.path()]), &["tokenizer.json: "]);
}

#[test]
fn usage() {
    let lines = [
        "",
        "polish",
        "dump",
        "dump deepseek-v2 --after polish",
        "dump deepseek-v2 --graph sideways",
        "compile deepseek-v2 -o /proc/x",
        "compile deepseek-v2 --target abacus -o /proc/x",
        "run /none --steps 1",
        "run /none --prompt a --prompt-ids 1 --steps 1",
        "run /none --prompt-ids 1 --steps many",
        "params deepseek-v2 --dtype int8",
    ];
    for line in lines {
        let out = latentc(line.split_whitespace());
        assert_eq!(out.status.code(), Some(2), "latentc {line}");
        assert!(out.stdout.is_empty(), "latentc {line}");
    }
}

#[test]
fn inputs_that_are_no_texts() {
    let folder = scratch();
    let (file, out) = (folder.path().join("in.safetensors"), folder.path().join("out.safetensors"));
    let evaluate = |tensors: &[(&str, DType, &[usize], Vec<u8>)]| {
        let owned =
            |(n, d, s, b): &(&str, DType, &[usize], Vec<u8>)| (n.to_string(), (*d, s.to_vec(), b.clone()));
        write(&file, &tensors.iter().map(owned).collect::<Tensors>());
        let message = error("eval {} --inputs {} --out {}", &[&case("tiny"), &file, &out]);
        assert!(!out.exists());
        says(&message, &["in.safetensors: "]);
        message
    };
    let ids = |ids: &[i64]| i64s(ids);
    says(&evaluate(&[]), &["no tensor `input_ids`", "it holds nothing"]);
    says(&evaluate(&[("ids", DType::I64, &[1, 1], ids(&[1]))]), &["no tensor `input_ids`", "`ids`"]);
    says(&evaluate(&[("input_ids", DType::F32, &[1, 2], ids(&[1]))]), &["`input_ids` is f32"]);
    says(&evaluate(&[("input_ids", DType::I64, &[2], ids(&[1, 2]))]), &["shape [2]", "[b, s]"]);
    says(&evaluate(&[("input_ids", DType::I64, &[1, 0], ids(&[]))]), &["no token"]);
    let outside = evaluate(&[("input_ids", DType::I64, &[2, 2], ids(&[1, 2, 3, 199]))]);
    says(&outside, &["input_ids[1, 1] is 199", "vocabulary of 199"]);
    says(&evaluate(&[("input_ids", DType::I64, &[1, 1], ids(&[-5]))]), &["input_ids[0, 0] is -5"]);
    let long = vec![1; 257];
    let long = evaluate(&[("input_ids", DType::I64, &[1, 257], ids(&long))]);
    says(&long, &["a text of 257 tokens", "256 positions"]);

    let masked = |dtype, shape: &[usize], mask: Vec<u8>| {
        evaluate(&[
            ("input_ids", DType::I64, &[1, 3], ids(&[1, 2, 3])),
            ("attention_mask", dtype, shape, mask),
        ])
    };
    says(&masked(DType::I64, &[1, 2], ids(&[1, 1])), &["`attention_mask` has the shape [1, 2]", "[1, 3]"]);
    says(&masked(DType::F32, &[1, 3], vec![0; 12]), &["`attention_mask` is f32"]);
    says(&masked(DType::I64, &[1, 3], ids(&[1, 0, 1])), &["attention_mask row 0"]);
    says(&masked(DType::I64, &[1, 3], ids(&[0, 0, 0])), &["no token"]);

    fs::write(&file, "not tensors").expect("a file of ours");
    let message = error("eval {} --inputs {} --out {}", &[&case("tiny"), &file, &out]);
    says(&message, &["in.safetensors: ", "not a safetensors file, or cut short"]);
    let message = error("eval {} --inputs {} --out {}", &[&case("tiny"), &folder.path().join("no"), &out]);
    says(&message, &["no: cannot read"]);
}

#[test]
fn an_output_that_cannot_be_written() {
    let inputs = case("tiny").join("expect.safetensors");
    let folder = scratch();
    let file = folder.path().join("file");
    fs::write(&file, "").expect("a file of ours");
    for out in [&file.join("out"), Path::new("/none/out"), Path::new("/proc/out"), folder.path()] {
        let message = error("eval {} --inputs {} --out {}", &[&case("tiny"), &inputs, out]);
        says(&message, &["cannot write"]);
    }
    let line = "eval {} --inputs {} --out {} --prefill 3";
    says(&error(line, &[&case("tiny"), &inputs, &folder.path().join("x")]), &["--graph decode"]);
}

#[test]
fn gradients_by_weights_that_are_held_as_codes() {
    let line = "dump {} --graph gradient --weights int8 --after encode";
    says(
        &error(line, &[&case("tiny")]),
        &["no gradient by weights that are held in int8", "train without --weights"],
    );
}
