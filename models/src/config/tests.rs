use proptest::prelude::*;
use serde_json::{Map, Value, json};

use super::*;

/// The published Lite configuration: greedy routing, YaRN.
fn lite() -> Value {
    ModelConfig::bundled("deepseek-v2-lite").unwrap().to_json()
}

/// The published V2 configuration: group-limited routing.
fn v2() -> Value {
    ModelConfig::bundled("deepseek-v2").unwrap().to_json()
}

fn llama() -> Value {
    ModelConfig::bundled("deepseek-67b").unwrap().to_json()
}

fn with(mut config: Value, changes: Value) -> Value {
    for (path, value) in changes.as_object().unwrap() {
        let (outer, inner) = path.split_once('.').unwrap_or((path, ""));
        if inner.is_empty() {
            config[outer] = value.clone();
        } else {
            config[outer][inner] = value.clone();
        }
    }
    config
}

fn without(mut config: Value, keys: &[&str]) -> Value {
    for key in keys {
        config.as_object_mut().unwrap().remove(*key).expect("a key to remove");
    }
    config
}

fn read(config: &Value) -> Result<ModelConfig, ConfigError> {
    ModelConfig::from_str("c.json", &config.to_string())
}

fn deepseek(config: &Value) -> DeepseekV2Config {
    match read(config) {
        Ok(ModelConfig::DeepseekV2(c)) => c,
        other => panic!("{other:?}"),
    }
}

/// The whole message, so that a case shows what a user sees.
fn refused(config: &Value, message: &str) {
    let found = read(config).map(|_| ()).unwrap_err().to_string();
    assert_eq!(found, message);
}

#[test]
fn bundled_models_have_the_published_number_of_weights() {
    let billions = |name| ModelConfig::bundled(name).unwrap().parameter_count() as f64 / 1e9;
    assert_eq!(format!("{:.1}", billions("deepseek-v2")), "235.7");
    assert_eq!(format!("{:.1}", billions("deepseek-v2-lite")), "15.7");
    assert_eq!(format!("{:.1}", billions("deepseek-67b")), "67.4");
    assert_eq!(format!("{:.2}", billions("bench-moe-0.3b")), "0.29");
}

#[test]
fn an_unknown_name_lists_the_known_ones() {
    assert_eq!(
        ModelConfig::bundled("v3").unwrap_err().to_string(),
        "unknown model `v3`; known: deepseek-v2, deepseek-v2-lite, deepseek-67b, bench-moe-0.3b"
    );
}

#[test]
fn the_published_form_is_written_back() {
    for name in ModelConfig::bundled_names() {
        let config = ModelConfig::bundled(name).unwrap();
        let again = ModelConfig::from_str(name, &config.to_json().to_string()).unwrap();
        assert_eq!(again.to_json(), config.to_json());
        assert_eq!(again.common().source["bos_token_id"], config.common().source["bos_token_id"]);
    }
    let c = deepseek(&v2());
    assert_eq!((c.q_lora_rank, c.kv_lora_rank, c.common.dtype), (Some(1536), 512, DType::BF16));
    assert_eq!(c.common.eos_token_ids, [100001]);
    let moe = c.moe.as_ref().unwrap();
    assert_eq!(moe.topk_method, TopkMethod::GroupLimitedGreedy { n_group: 8, topk_group: 3 });
    assert_eq!((c.is_moe(0), c.is_moe(1), c.is_moe(59), c.is_moe(60)), (false, true, true, false));
}

#[test]
fn the_form_of_transformers_5_means_the_same() {
    let rope = json!({
        "rope_theta": 10000, "rope_type": "yarn", "type": "yarn", "factor": 40, "beta_fast": 32,
        "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707, "original_max_position_embeddings": 4096,
    });
    let new = without(v2(), &["rope_theta", "rope_scaling", "torch_dtype"]);
    let new =
        with(new, json!({"rope_parameters": rope, "dtype": "bfloat16", "head_dim": 64, "qk_head_dim": 192}));
    let (mut new, mut old) = (deepseek(&new), deepseek(&v2()));
    assert!(read(&Value::Object(new.to_json())).is_ok());
    new.common.source = Map::new();
    old.common.source = Map::new();
    assert_eq!(new, old);

    let plain = with(v2(), json!({"rope_scaling": {"rope_type": "default"}}));
    assert_eq!(deepseek(&plain).rope.yarn, None);
}

#[test]
fn what_a_file_may_leave_out() {
    let silent = without(
        lite(),
        &[
            "rms_norm_eps",
            "rope_theta",
            "rope_scaling",
            "torch_dtype",
            "topk_method",
            "norm_topk_prob",
            "routed_scaling_factor",
            "scoring_func",
            "hidden_act",
            "attention_bias",
            "num_key_value_heads",
            "moe_layer_freq",
            "eos_token_id",
            "n_group",
            "topk_group",
            "max_position_embeddings",
        ],
    );
    let c = deepseek(&silent);
    assert_eq!((c.common.dtype, c.common.rms_norm_eps), (DType::F32, 1e-6));
    assert_eq!(c.rope, Rope { theta: 10000.0, yarn: None });
    let moe = c.moe.unwrap();
    assert_eq!(
        (moe.topk_method, moe.routed_scaling_factor, moe.moe_layer_freq),
        (TopkMethod::Greedy, 1.0, 1)
    );
    let none_shared = deepseek(&with(lite(), json!({"n_shared_experts": null})));
    assert_eq!(none_shared.moe.unwrap().n_shared_experts, 0);
}

#[test]
fn a_model_may_be_dense_throughout() {
    let moe_keys = ["n_shared_experts", "moe_intermediate_size", "num_experts_per_tok"];
    let by_null = with(without(lite(), &moe_keys), json!({"n_routed_experts": null}));
    let by_depth = with(without(lite(), &moe_keys), json!({"first_k_dense_replace": 27}));
    for config in [by_null, by_depth] {
        let c = deepseek(&config);
        assert_eq!((c.moe.is_none(), c.is_moe(26)), (true, false));
        assert_eq!(deepseek(&Value::Object(c.to_json())).moe, None);
    }
}

#[test]
fn every_other_layer_may_be_dense() {
    let c = deepseek(&with(lite(), json!({"moe_layer_freq": 2})));
    let routed: Vec<usize> = (0..8).filter(|l| c.is_moe(*l)).collect();
    assert_eq!(routed, [2, 4, 6]);
}

#[test]
fn unsupported_variants_are_named() {
    for (change, message) in [
        (
            json!({"scoring_func": "sigmoid"}),
            "`scoring_func`: not supported: is the string \"sigmoid\", only \"softmax\" is",
        ),
        (
            json!({"hidden_act": "gelu"}),
            "`hidden_act`: not supported: is the string \"gelu\", only \"silu\" is",
        ),
        (json!({"attention_bias": true}), "`attention_bias`: not supported: is true, only false is"),
        (
            json!({"topk_method": "noaux_tc"}),
            "`topk_method`: not supported: is \"noaux_tc\", only \"greedy\" and \"group_limited_greedy\" are",
        ),
        (
            json!({"rope_scaling.type": "linear"}),
            "`rope_scaling.type`: not supported: is \"linear\", only \"yarn\" and \"default\" are",
        ),
        (
            json!({"torch_dtype": "float8_e4m3fn"}),
            "`torch_dtype`: not supported: is \"float8_e4m3fn\", only float32, float16 and bfloat16 are",
        ),
        (
            json!({"quantization_config": {"bits": 4}}),
            "`quantization_config`: not supported: is an object of 1 keys, only null is",
        ),
    ] {
        refused(&with(lite(), change), &format!("c.json: {message}"));
    }
}

#[test]
fn a_wrong_value_is_shown_beside_what_it_must_be() {
    let whole = "but must be a whole number from 1 to 16777216";
    for (change, message) in [
        (
            json!({"hidden_size": "2048"}),
            "`hidden_size`: is the string \"2048\", but must be a whole number".into(),
        ),
        (json!({"hidden_size": -2048}), format!("`hidden_size`: is -2048, {whole}")),
        (json!({"hidden_size": 2048.5}), format!("`hidden_size`: is 2048.5, {whole}")),
        (json!({"kv_lora_rank": 1e30}), format!("`kv_lora_rank`: is 1e+30, {whole}")),
        (json!({"num_attention_heads": 0}), format!("`num_attention_heads`: is 0, {whole}")),
        (
            json!({"v_head_dim": null}),
            "`v_head_dim`: null, but the model's shapes need it; write a number".into(),
        ),
        (json!({"rope_theta": 1}), "`rope_theta`: is 1, but must be a finite number greater than 1".into()),
        (json!({"seq_aux": 1}), "`seq_aux`: is 1, but must be true or false".into()),
        (
            json!({"eos_token_id": -1}),
            "`eos_token_id`: is -1, but must be a token id, a list of token ids, or null".into(),
        ),
        (
            json!({"rope_scaling": []}),
            "`rope_scaling`: is a list of 0 items, but must be an object or null".into(),
        ),
        (
            json!({"rope_scaling.factor": 0.5}),
            "`rope_scaling.factor`: is 0.5, but yarn can only lengthen a context: write 1 or more".into(),
        ),
        (
            json!({"qk_rope_head_dim": 7}),
            "`qk_rope_head_dim`: is 7, but RoPE turns pairs; write an even number".into(),
        ),
    ] {
        refused(&with(lite(), change), &format!("c.json: {message}"));
    }
    refused(
        &without(lite(), &["q_lora_rank"]),
        "c.json: `q_lora_rank`: missing; write a whole number, or null if the model has none",
    );
    refused(
        &without(lite(), &["vocab_size"]),
        "c.json: `vocab_size`: missing, but the model's shapes need it; write a number",
    );
}

#[test]
fn keys_that_disagree_are_both_named() {
    for (change, message) in [
        (
            json!({"num_experts_per_tok": 161}),
            "`num_experts_per_tok`: is 161, but n_routed_experts is 160; choose no more than there are",
        ),
        (
            json!({"n_group": 7}),
            "`n_group`: is 7, which does not divide n_routed_experts, 160; groups are of equal size",
        ),
        (
            json!({"topk_group": 9}),
            "`topk_group`: is 9, but n_group is 8; keep no more groups than there are",
        ),
        (
            json!({"num_experts_per_tok": 61}),
            "`num_experts_per_tok`: is 61, but topk_group 3 of n_group 8 keeps 60 of 160 experts; keep more groups or choose fewer experts",
        ),
        (
            json!({"num_key_value_heads": 8}),
            "`num_key_value_heads`: is 8, but latent attention has one key per head of 128; write 128 or null",
        ),
        (
            json!({"dtype": "float32"}),
            "`dtype`: is \"float32\", but torch_dtype is bfloat16; remove one of them",
        ),
        (
            json!({"rope_parameters": {"rope_theta": 5000}}),
            "2 problems\n  `rope_theta`: is 10000 here and 5000 in rope_parameters; remove one of them\n  `rope_parameters`: states another scaling than rope_scaling; remove one of them",
        ),
    ] {
        refused(&with(v2(), change), &format!("c.json: {message}"));
    }
    for (change, message) in [
        (
            json!({"num_key_value_heads": 7}),
            "`num_key_value_heads`: is 7, which does not divide num_attention_heads, 64",
        ),
        (
            json!({"num_attention_heads": 48}),
            "`num_attention_heads`: is 48, which does not divide hidden_size, 8192; write a head_dim",
        ),
        (json!({"head_dim": 3}), "`head_dim`: is 3, but RoPE turns pairs; write an even number"),
        (
            json!({"rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 4096}}),
            "`rope_scaling`: not supported: a llama with yarn; only deepseek_v2 is extended so",
        ),
    ] {
        refused(&with(llama(), change), &format!("c.json: {message}"));
    }
}

#[test]
fn all_problems_are_listed_at_once() {
    let change = json!({"hidden_size": "x", "num_attention_heads": 0, "num_experts_per_tok": 65, "rope_scaling.factor": "y"});
    refused(
        &without(with(lite(), change), &["kv_lora_rank"]),
        "c.json: 5 problems
  `hidden_size`: is the string \"x\", but must be a whole number
  `num_attention_heads`: is 0, but must be a whole number from 1 to 16777216
  `kv_lora_rank`: missing, but the model's shapes need it; write a number
  `rope_scaling.factor`: is the string \"y\", but must be a finite number greater than 0
  `num_experts_per_tok`: is 65, but n_routed_experts is 64; choose no more than there are",
    );
}

#[test]
fn sizes_that_no_machine_holds_are_refused() {
    let config = with(lite(), json!({"vocab_size": 16_777_216, "hidden_size": 16_777_216}));
    let message = read(&config).unwrap_err().to_string();
    assert!(message.ends_with("weights, more than any machine holds"), "{message}");
}

#[test]
fn a_file_that_is_no_configuration_says_so() {
    refused(&json!({"model_type": "gpt2"}), "c.json: `model_type`: is \"gpt2\"; known: deepseek_v2, llama");
    refused(&json!({}), "c.json: `model_type`: missing; known: deepseek_v2, llama");
    refused(&json!([1]), "c.json: `.`: the file holds no JSON object; give a model's config.json");
    let message = ModelConfig::from_str("c.json", "{\"a\": ").unwrap_err().to_string();
    assert_eq!(message, "c.json: not JSON: EOF while parsing a value at line 1 column 6");

    let folder = tempfile::tempdir().unwrap();
    let message = ModelConfig::from_path(folder.path()).unwrap_err().to_string();
    assert!(message.contains("config.json: cannot read the model's configuration: "), "{message}");
    std::fs::write(folder.path().join("config.json"), lite().to_string()).unwrap();
    assert!(ModelConfig::from_path(folder.path()).is_ok());
    assert!(ModelConfig::from_path(folder.path().join("config.json")).is_ok());
}

/// The reference cases count their own weights, in another language.
#[test]
fn weights_are_counted_as_they_are_stored() {
    let cases = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/cases");
    for case in ["tiny", "tiny-llama"] {
        let text = std::fs::read_to_string(cases.join(case).join("meta.json")).unwrap();
        let meta: Value = serde_json::from_str(&text).unwrap();
        let config = ModelConfig::from_path(cases.join(case)).unwrap();
        assert_eq!(meta["parameters"], json!(config.parameter_count() as u64), "{case}");
    }
}

fn any_value() -> impl Strategy<Value = Option<Value>> {
    prop_oneof![
        Just(None),
        Just(Some(Value::Null)),
        any::<bool>().prop_map(|b| Some(json!(b))),
        any::<i64>().prop_map(|n| Some(json!(n))),
        (0..20i64).prop_map(|n| Some(json!(n))),
        any::<f64>().prop_map(|x| Some(json!(x))),
        "[a-z_]{0,12}".prop_map(|s| Some(json!(s))),
        Just(Some(json!({"type": "yarn", "factor": 40}))),
        Just(Some(json!([1, 2]))),
    ]
}

proptest! {
    /// Whatever is changed in a configuration, it reads soundly or is refused in words.
    #[test]
    fn no_change_of_a_file_is_met_with_a_panic(
        which in 0..3usize,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any_value()), 1..6),
    ) {
        let mut config = [v2(), lite(), llama()][which].clone();
        let mut keys: Vec<(Option<&str>, String)> =
            config.as_object().unwrap().keys().map(|k| (None, k.clone())).collect();
        if let Some(rope) = config["rope_scaling"].as_object() {
            keys.extend(rope.keys().map(|k| (Some("rope_scaling"), k.clone())));
        }
        for (index, value) in changes {
            let (outer, key) = index.get(&keys);
            let place = match outer {
                None => config.as_object_mut(),
                Some(outer) => config.get_mut(outer).and_then(Value::as_object_mut),
            };
            let Some(map) = place else { continue };
            match value {
                Some(value) => map.insert(key.clone(), value),
                None => map.remove(key),
            };
        }
        match read(&config) {
            Ok(found) => {
                prop_assert_eq!(read(&found.to_json()).unwrap().to_json(), found.to_json());
                if let ModelConfig::DeepseekV2(c) = &found && c.qk_rope_head_dim <= 1 << 10 {
                    prop_assert!(c.rope.inv_freq(c.qk_rope_head_dim).iter().all(|f| f.is_finite()));
                    prop_assert!(c.rope.cos_sin_scale() * c.rope.attention_scale_factor() > 0.0);
                }
            }
            Err(e) => prop_assert!(e.to_string().starts_with("c.json: ")),
        }
    }

    #[test]
    fn no_text_is_met_with_a_panic(text in ".{0,80}") {
        let _ = ModelConfig::from_str("c.json", &text);
    }
}

#[test]
fn a_cut_model_keeps_every_kind_of_layer() {
    let kinds = |config: &ModelConfig| {
        let ModelConfig::DeepseekV2(c) = config else { return (config.common().num_hidden_layers, 0) };
        let routed = (0..c.common.num_hidden_layers).filter(|&l| c.is_moe(l)).count();
        (c.common.num_hidden_layers - routed, routed)
    };
    let published = ModelConfig::DeepseekV2(deepseek(&lite()));
    assert_eq!([1, 3, 99].map(|n| kinds(&published.with_layers(n))), [(1, 1), (1, 3), (1, 26)]);
    let dense = with(lite(), json!({"first_k_dense_replace": 5, "moe_layer_freq": 2}));
    let sparse = ModelConfig::DeepseekV2(deepseek(&dense));
    // Those that alternate come with what lies between them.
    assert_eq!(kinds(&sparse.with_layers(2)), (3, 2));
    let llama = ModelConfig::bundled("deepseek-67b").unwrap();
    assert_eq!(kinds(&llama.with_layers(2)), (2, 0));
    assert_eq!(llama.with_layers(999), llama);
}
