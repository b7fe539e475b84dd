//! Downloads against a server on this machine that behaves as the Hub does, and misbehaves as networks do.

#![allow(clippy::unwrap_used)]

mod server;

use std::fs;
use std::path::Path;
use std::time::Duration;

use hub::{Error, Hub};

use server::{COMMIT, Faults, Server};

fn client(server: &Server, cache: &Path) -> Hub {
    let mut hub = Hub::from_env();
    hub.endpoint.clone_from(&server.hub);
    hub.cache = cache.into();
    hub.offline = false;
    hub.backoff = Duration::from_millis(1);
    hub
}

fn quiet(_: &str, _: u64, _: u64) {}

fn rows() -> Vec<u8> {
    (0..4000)
        .flat_map(|i| format!("{{\"chosen\": \"a{i}\", \"rejected\": \"b{i}\"}}\n").into_bytes())
        .collect()
}

#[test]
fn a_data_set_comes_whole_through_every_fault_and_stays() {
    let rows = rows();
    let files: [(&str, &[u8]); 4] = [
        ("README.md", b"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: x/*.jsonl\n---\n"),
        ("x/a.jsonl", &rows),
        ("x/b.jsonl", b""),
        ("other.jsonl", b"not wanted"),
    ];
    let cases = [
        Faults::default(),
        Faults { unavailable: true, cut_after: Some(1000), ..Faults::default() },
        Faults { cut_after: Some(500), ignore_range: true, ..Faults::default() },
        Faults { cut_after: Some(70), wrong_bytes: true, ..Faults::default() },
    ];
    for faults in cases {
        let server = Server::start(&files, faults.clone(), false);
        let dir = tempfile::tempdir().unwrap();
        let mut hub = client(&server, dir.path());
        let splits = hub.dataset("some/set", None, None, &["train"], &quiet).unwrap();
        let paths = splits.split("train").unwrap();
        assert_eq!(paths.len(), 2);
        assert!(fs::read(&paths[0]).unwrap() == rows);
        assert!(fs::read(&paths[1]).unwrap().is_empty());
        let seen = server.seen.lock().unwrap().clone();
        assert!(!seen.iter().any(|line| line.contains("other.jsonl")), "what is not wanted is not fetched");
        if faults.cut_after == Some(1000) {
            assert!(seen.iter().any(|line| line.contains("x/a.jsonl Some(1000)")), "{seen:#?}");
        }
        // The second time nothing is fetched but the list of files, and offline not even that.
        server.seen.lock().unwrap().clear();
        assert_eq!(hub.dataset("some/set", None, None, &[], &quiet).unwrap(), splits);
        assert_eq!(server.seen.lock().unwrap().len(), 1);
        hub.offline = true;
        assert_eq!(hub.dataset("some/set", None, None, &[], &quiet).unwrap(), splits);
        assert_eq!(hub.dataset("some/set", Some(COMMIT), None, &[], &quiet).unwrap(), splits);
        assert_eq!(server.seen.lock().unwrap().len(), 1);
        let missing = hub.dataset("some/other", None, None, &[], &quiet).unwrap_err();
        assert!(missing.to_string().contains("HF_HUB_OFFLINE"), "{missing}");
        // An unreachable Hub is no obstacle either.
        hub.offline = false;
        hub.endpoint = "http://127.0.0.1:1".into();
        assert_eq!(hub.dataset("some/set", None, None, &[], &quiet).unwrap(), splits);
        let leftovers = fs::read_dir(dir.path().join("datasets--some--set/blobs")).unwrap();
        assert_eq!(leftovers.count(), 3, "README.md and two files, no parts");
    }
}

#[test]
fn a_model_comes_with_what_it_needs_and_no_more() {
    let files: [(&str, &[u8]); 6] = [
        ("config.json", b"{}"),
        ("tokenizer.json", b"{}"),
        ("model.safetensors", b"weights"),
        ("pytorch_model.bin", b"weights again"),
        ("onnx/model.json", b"{}"),
        ("additional_chat_templates/tool_use.jinja", b"x"),
    ];
    let server = Server::start(&files, Faults::default(), true);
    let dir = tempfile::tempdir().unwrap();
    // The token comes from the environment; a private repository without one is refused with a hint.
    let error = client(&server, dir.path()).model("some/model", None, &quiet).unwrap_err();
    assert!(matches!(error, Error::Refused { status: 401, .. }) && error.to_string().contains("HF_TOKEN"));
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_with_a_token", "--nocapture", "--include-ignored"])
        .env("HF_TOKEN", "secret\n")
        .env("HF_ENDPOINT", &server.hub)
        .env("HF_HOME", dir.path())
        .env("HUB_TEST_CHILD", "1")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let model = dir.path().join("hub/models--some--model/snapshots").join(COMMIT);
    let mut names: Vec<String> = fs::read_dir(&model)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort_unstable();
    assert_eq!(names, ["additional_chat_templates", "config.json", "model.safetensors", "tokenizer.json"]);
    assert_eq!(fs::read_to_string(dir.path().join("hub/models--some--model/refs/main")).unwrap(), COMMIT);
    let seen = server.seen.lock().unwrap();
    let of_storage: Vec<&String> = seen.iter().filter(|line| line.contains("/storage/")).collect();
    assert!(
        !of_storage.is_empty() && of_storage.iter().all(|line| line.ends_with("false")),
        "the token stays at home"
    );
}

/// Run by the test above with the environment that a user would set.
#[test]
fn child_with_a_token() {
    if std::env::var_os("HUB_TEST_CHILD").is_some() {
        Hub::from_env().model("some/model", None, &quiet).unwrap();
    }
}

#[test]
fn what_is_neither_here_nor_on_the_hub_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(&[("weights.bin", b"x")], Faults::default(), false);
    let hub = client(&server, dir.path());
    assert!(hub.model("./nowhere", None, &quiet).unwrap_err().to_string().contains("./nowhere"));
    let error = hub.model("some/model", None, &quiet).unwrap_err().to_string();
    assert!(error.contains("config.json"), "{error}");
    let error = hub.dataset("nothing.jsonl", None, None, &[], &quiet).unwrap_err().to_string();
    assert!(error.contains("no such file"), "{error}");
}

#[test]
fn a_part_of_a_data_set_is_not_taken_for_the_whole() {
    let rows = rows();
    let names = ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"];
    let files = [(names[0], rows.as_slice()), (names[1], &rows[..500])];
    let server = Server::start(&files, Faults::default(), false);
    server.fault(names[1], Faults { refused: true, ..Faults::default() });
    let dir = tempfile::tempdir().unwrap();
    let mut hub = client(&server, dir.path());
    let get = |hub: &Hub| hub.dataset("some/set", None, None, &[], &quiet);
    assert!(matches!(get(&hub), Err(Error::Refused { status: 403, .. })));
    hub.offline = true;
    let error = get(&hub).unwrap_err().to_string();
    assert!(error.contains(names[1]), "{error}");
    hub.offline = false;
    server.fault(names[1], Faults::default());
    assert_eq!(get(&hub).unwrap().split("train").unwrap().len(), 2);
}

#[test]
fn two_downloads_of_the_same_file_do_not_disturb_each_other() {
    let rows = rows();
    for cut in [100, 5000, 20_000] {
        let faults = Faults { cut_after: Some(cut), ..Faults::default() };
        let server = Server::start(&[("train.jsonl", rows.as_slice())], faults, false);
        let dir = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let splits =
                        client(&server, dir.path()).dataset("some/set", None, None, &[], &quiet).unwrap();
                    assert!(fs::read(&splits.split("train").unwrap()[0]).unwrap() == rows);
                });
            }
        });
    }
}

#[test]
fn flags_of_the_hub_do_not_fit_local_paths() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("a.jsonl");
    fs::write(&file, "{}").unwrap();
    let hub = Hub::from_env();
    let refused = |result: Result<_, Error>| result.map(|_: pref_data::Splits| ()).unwrap_err().to_string();
    let name = file.to_str().unwrap();
    assert!(refused(hub.dataset(name, Some("abc"), None, &[], &quiet)).contains("--dataset-revision"));
    assert!(refused(hub.dataset(name, None, Some("abc"), &[], &quiet)).contains("--dataset-config"));
    assert!(refused(hub.dataset("data/nosuch.jsonl", None, None, &[], &quiet)).contains("no such file"));
    let model = hub.model(dir.path().to_str().unwrap(), Some("abc"), &quiet).unwrap_err().to_string();
    assert!(model.contains("--model-revision"));
}
