//! Property tests: the protocol parses any input without a panic, and its replies are bounded. The inputs are
//! random and their number is fixed; `PROPTEST_CASES` sets another number.

use std::path::Path;

use proptest::collection::{btree_map, vec};
use proptest::prelude::*;
use serde_json::{Map, Value};
use tokio::io::BufReader;

use super::framing::{self, Line};
use super::limits::ClientBudget;
use super::peers::Peer;
use super::protocol::{self, Refusal, Request, Sender};

/// Values with a meaning in the protocol.
const WORDS: &[&str] = &[
    "restore_start",
    "norestore_start",
    "stop",
    "acpi_stop",
    "lock",
    "unlock",
    "acquire",
    "reserve",
    "unreserve",
    "state",
    "list",
    "dump_memory",
    "screenshot",
    "console",
    "enable_machine",
    "disable_machine",
    "hold_machine",
    "release_machine",
    "disable",
    "enable",
    "wait_idle",
    "reload",
    "shutdown_all",
    "subscribe",
    "version",
    "m",
    "elf",
    "/tmp/x",
    "",
];

/// The protocol's own keys.
const KEYS: &[&str] = &[
    "action",
    "machine",
    "id",
    "task_id",
    "pcap_path",
    "memory_dump_path",
    "path",
    "fd",
    "format",
    "name",
    "platform",
    "os_version",
    "architecture",
    "tags",
    "reason",
];

/// The length of a reason that repeats a client's words, at most.
const MAX_REASON: usize = 8 * 1024;

/// A text: a random one, one with a meaning, or one that is too long.
fn text() -> impl Strategy<Value = String> {
    prop_oneof![
        6 => prop::sample::select(WORDS).prop_map(str::to_owned),
        3 => any::<String>(),
        1 => (any::<char>(), 1..20_000_usize).prop_map(|(c, count)| c.to_string().repeat(count)),
        1 => Just("/a\0b".to_owned()),
    ]
}

fn json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        text().prop_map(Value::from),
    ];
    leaf.prop_recursive(5, 32, 6, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..6).prop_map(Value::from),
            btree_map(any::<String>(), inner, 0..6)
                .prop_map(|map| map.into_iter().collect::<Map<_, _>>().into()),
        ]
    })
}

/// An object with the protocol's keys.
fn object() -> impl Strategy<Value = Map<String, Value>> {
    let value = prop_oneof![4 => text().prop_map(Value::from), 1 => json()];
    btree_map(prop::sample::select(KEYS), value, 0..10)
        .prop_map(|map| map.into_iter().map(|(key, value)| (key.to_owned(), value)).collect())
}

fn assert_bounded(refusal: &Refusal) {
    let length = refusal.reason.len();
    assert!(length <= MAX_REASON, "{length} bytes: {:.200}", refusal.reason);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]

    #[test]
    fn bytes_are_an_object_or_a_bounded_refusal(bytes in vec(any::<u8>(), 0..300)) {
        if let Err(refusal) = protocol::object(&bytes) {
            assert_bounded(&refusal);
        }
    }

    #[test]
    fn object_is_unchanged_by_serialisation(object in object()) {
        let line = Value::from(object.clone()).to_string();
        let read = protocol::object(line.as_bytes()).unwrap();
        prop_assert_eq!(read.keys().collect::<Vec<_>>(), object.keys().collect::<Vec<_>>());
    }

    #[test]
    fn object_is_a_request_or_a_bounded_refusal(object in object(), enabled in any::<bool>()) {
        if let Err(refusal) = protocol::id(&object) {
            assert_bounded(&refusal);
        }
        let sender = Sender { peer: Peer { uid: 0, owner: None }, file: None, storage: Path::new("/cwd/storage") };
        match protocol::request(&object, enabled, &sender, |_| None) {
            Err(refusal) => assert_bounded(&refusal),
            Ok(Request::Acquire(_, lock)) => {
                prop_assert!(enabled);
                prop_assert!(!lock.task_id.is_empty() && lock.task_id.len() <= 256);
                for path in [lock.pcap_path, lock.memory_dump_path].into_iter().flatten() {
                    prop_assert!(path.is_absolute());
                    prop_assert!(!path.to_string_lossy().contains('\0'));
                }
            }
            // There are no machines here.
            Ok(request) => prop_assert!(matches!(
                request,
                Request::List
                    | Request::Version
                    | Request::Subscribe
                    | Request::ShutdownAll
                    | Request::SetEnabled(_)
                    | Request::WaitIdle
                    | Request::Reload
            )),
        }
    }

    #[test]
    fn framing_splits_bytes_at_newlines_in_chunks_of_any_size(bytes in vec(prop_oneof![Just(b'\n'), any::<u8>()], 0..500), chunk in 1..50_usize) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let mut reader = BufReader::with_capacity(chunk, bytes.as_slice());
        let (mut read, budget) = (Vec::new(), ClientBudget::default());
        while let Line::Whole(line) = runtime.block_on(framing::next(&mut reader, &budget)).unwrap() {
            read.push(line);
        }
        let mut expected: Vec<_> = bytes.split(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect();
        // The bytes after the last newline are an unfinished line.
        expected.pop();
        prop_assert_eq!(read, expected);
    }
}
