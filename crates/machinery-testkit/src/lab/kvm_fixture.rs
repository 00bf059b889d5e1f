//! The fixture of the end-to-end tests of the kvm machinery: a lab with the machine `m`, a host, and clients.

// These methods are assertions of tests: they panic instead of returning an error.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::time::Duration;

use rustix::process::Pid;
use serde_json::{Value, json};

use super::{FileEvent, FileWatch, KvmLab};
use crate::client::Client;
use crate::guest::Guest;
use crate::host::RunningHost;

/// The maximum time of a guest's reaction.
const TIMEOUT: Duration = Duration::from_secs(60);

/// A lab with the machine `m`, a host for it, a subscriber and a client. They are dropped in this order.
///
/// # Panics
/// All methods panic if the lab, the host or a client fails, or an expectation is not met.
pub struct KvmFixture {
    pub subscriber: Client,
    pub client: Client,
    pub host: RunningHost,
    pub lab: KvmLab,
}

impl KvmFixture {
    /// Starts a lab with these machines and this `machinery-host.yaml`, and a host.
    pub fn new(machines: &[(&str, Guest)], host_yaml: &str) -> Self {
        let lab = KvmLab::new(machines).unwrap();
        lab.cwd().host_yaml(host_yaml).unwrap();
        KvmFixture::of(lab)
    }

    /// Starts a host for the lab.
    pub fn of(lab: KvmLab) -> Self {
        let host = lab.host().unwrap();
        let mut subscriber = host.client().unwrap();
        subscriber.subscribe().unwrap();
        KvmFixture { subscriber, client: host.client().unwrap(), host, lab }
    }

    /// Replaces the subscriber by a new one, which gets later events only.
    pub fn subscribe_again(&mut self) {
        self.subscriber = self.host.client().unwrap();
        self.subscriber.subscribe().unwrap();
    }

    /// Requests an action, and expects success.
    #[track_caller]
    pub fn act(&mut self, action: &str) {
        let answer = self.client.act(action, "m").unwrap();
        assert_eq!(answer, json!({"success": true}), "{action}; {}", self.host.log());
    }

    /// Sends a request, and waits until a process opens that file beside the domain's disk. The answer is still to come.
    #[track_caller]
    pub fn send_until_opened(&mut self, request: Value, file: &str) {
        let watch = FileWatch::new(self.lab.machine("m").disk.parent().unwrap()).unwrap();
        self.client.send(&request).unwrap();
        watch.wait(&[FileEvent::Opened(file)], TIMEOUT).unwrap();
    }

    /// Sends a request, and waits until QEMU creates the file of the guest's serial port: the domain is being started.
    #[track_caller]
    pub fn send_until_start(&mut self, request: Value) {
        self.send_until_opened(request, "serial.log");
    }

    /// Sends a request, expects a failure, and returns the reason.
    #[track_caller]
    pub fn ask_refused(&mut self, request: Value) -> String {
        let answer = self.client.ask(request).unwrap();
        assert_eq!(answer["success"], false, "{answer}");
        answer["reason"].as_str().unwrap().to_owned()
    }

    /// Returns the machine's state.
    pub fn state(&mut self) -> Value {
        self.client.act("state", "m").unwrap()["state"].take()
    }

    /// Returns the machine's readiness for its next restore.
    pub fn readiness(&mut self) -> Value {
        self.client.machine("m").unwrap()["ready"].take()
    }

    /// Waits for the event of that state, and returns its reason.
    pub fn wait_for_state(&mut self, state: &str) -> String {
        self.subscriber.wait_for_state("m", state).unwrap()
    }

    /// Waits for the event of a readiness with that mode, and returns the readiness.
    pub fn wait_for_mode(&mut self, mode: &str) -> Value {
        loop {
            let readiness = self.next_readiness(mode);
            if readiness["mode"] == mode {
                return readiness;
            }
        }
    }

    /// Waits until the machine has a standby, and returns its readiness.
    pub fn wait_for_standby(&mut self) -> Value {
        // The event may have come before the subscription.
        let readiness = self.readiness();
        if readiness["mode"] == "standby" { readiness } else { self.wait_for_mode("standby") }
    }

    /// Waits until the machine's readiness has that mode, and a reason that contains these words.
    pub fn wait_for_readiness(&mut self, mode: &str, words: &str) {
        let is_wanted = |readiness: &Value| {
            readiness["mode"] == mode && readiness["reason"].as_str().is_some_and(|why| why.contains(words))
        };
        let mut readiness = self.readiness();
        while !is_wanted(&readiness) {
            readiness = self.next_readiness(mode);
        }
    }

    fn next_readiness(&mut self, mode: &str) -> Value {
        let event = self.subscriber.wait_for_event("ready", "m");
        event.unwrap_or_else(|error| panic!("no readiness {mode}: {error}; {}", self.host.log()))
    }

    /// Returns the QEMU of the machine's domain.
    pub fn qemu(&self) -> Pid {
        self.lab.qemu_of("m").unwrap()
    }

    /// Runs virsh, and returns its output.
    pub fn virsh(&self, arguments: &[&str]) -> String {
        self.lab.libvirtd().virsh(arguments).unwrap()
    }

    /// Restores the machine, and expects that its micro guest runs from the snapshot on.
    #[track_caller]
    pub fn restore(&mut self) {
        self.act("restore_start");
        self.assert_at_snapshot();
        self.lab.machine("m").wait_for_next_count(TIMEOUT).unwrap();
    }

    /// Expects that the micro guest was resumed at the snapshot.
    #[track_caller]
    pub fn assert_at_snapshot(&self) {
        let first = self.lab.machine("m").first_count(TIMEOUT).unwrap();
        assert_eq!(first, self.lab.restored_count().unwrap(), "{}", self.host.log());
    }

    /// Terminates the host, and expects exit code 0.
    #[track_caller]
    pub fn terminate(&mut self) {
        assert_eq!(self.host.terminate().unwrap().code(), Some(0), "{}", self.host.log());
    }

    /// Terminates the host, and expects no leftovers.
    #[track_caller]
    pub fn finish(mut self) {
        self.terminate();
        self.lab.assert_clean();
    }
}
