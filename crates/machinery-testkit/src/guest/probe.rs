//! Access to a running guest, independent of the machinery that drives it.
//!
//! A guest reports its progress on its serial port; the Linux guest also answers requests to its agent.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::time::Duration;

use super::recipe::AGENT_PORT;
use super::serial::{self, SerialWatch};
use crate::Result;
use crate::error::{Context, Error};

/// The observable sides of a machine's guest: its serial port and its agent.
#[derive(Debug, Clone)]
pub struct GuestProbe {
    /// The machine's name.
    pub name: String,
    /// The loopback address of the agent (Linux guest).
    pub ip: String,
    /// The file of the serial port. Every QEMU of the machine truncates it at its start.
    pub serial: PathBuf,
}

/// The marks in the Linux guest's RAM and on its disk. In the snapshot both are `snapshot`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Marks {
    /// The mark in RAM.
    pub ram: String,
    /// The mark on the disk.
    pub disk: String,
}

impl GuestProbe {
    /// Waits for the micro guest's first count in this run. Call it after the start: the output of an earlier
    /// run stays until then.
    pub fn first_count(&self, timeout: Duration) -> Result<u32> {
        SerialWatch::new(&self.serial)?.wait_for(timeout, None, |said| serial::counts(said).next())
    }

    /// Returns the micro guest's last count in this run.
    pub fn last_count(&self) -> Result<u32> {
        let last = serial::counts(&serial::output(&self.serial)?).next_back();
        last.ok_or_else(|| {
            Error::new(format!("the machine {} has not counted yet ({})", self.name, self.serial.display()))
        })
    }

    /// Waits until the micro guest has counted to `count` or further in this run.
    pub fn wait_for_count(&self, count: u32, timeout: Duration) -> Result<u32> {
        SerialWatch::new(&self.serial)?
            .wait_for(timeout, None, |said| serial::counts(said).find(|n| *n >= count))
    }

    /// Waits for the micro guest's next count.
    pub fn wait_for_next_count(&self, timeout: Duration) -> Result<()> {
        self.first_count(timeout)?;
        self.wait_for_count(self.last_count()? + 1, timeout).map(drop)
    }

    /// Waits until the guest has printed `text` in this run, such as [`linux::READY`](super::linux::READY)
    /// after a cold boot.
    pub fn wait_for_text(&self, text: &str, timeout: Duration) -> Result<()> {
        SerialWatch::new(&self.serial)?.wait_for(timeout, None, |said| said.contains(text).then_some(()))
    }

    /// Returns the status and the body of the agent's answer to `GET path`.
    pub fn get(&self, path: &str, timeout: Duration) -> Result<(u16, String)> {
        let what = || format!("asking the agent of {} for {path}", self.name);
        let mut agent = TcpStream::connect((self.ip.as_str(), AGENT_PORT)).context(what)?;
        agent.set_read_timeout(Some(timeout)).context(what)?;
        write!(agent, "GET {path} HTTP/1.0\r\nHost: {}\r\n\r\n", self.ip).context(what)?;
        let mut answer = String::new();
        agent.read_to_string(&mut answer).context(what)?;
        let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok());
        let body = answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned());
        status.zip(body).ok_or_else(|| Error::new(format!("{}: {answer:?} is no answer", what())))
    }

    /// Writes marks to the Linux guest's RAM and disk (letters and digits), and reads them back.
    pub fn mark(&self, ram: &str, disk: &str, timeout: Duration) -> Result<Marks> {
        self.asked_marks(&format!("/cgi-bin/mark?ram={ram}&disk={disk}"), timeout)
    }

    /// Makes the Linux guest write that many MiB of its noise to its disk, also after this call. An answer is
    /// not required: a full disk may have stopped the guest.
    pub fn fill_disk(&self, mib: u32) {
        let _ = self.get(&format!("/cgi-bin/mark?fill={mib}"), Duration::from_secs(5));
    }

    /// Reads the marks in the Linux guest's RAM and on its disk.
    pub fn marks(&self, timeout: Duration) -> Result<Marks> {
        self.asked_marks("/cgi-bin/marks", timeout)
    }

    fn asked_marks(&self, path: &str, timeout: Duration) -> Result<Marks> {
        let (_, body) = self.get(path, timeout)?;
        let what = || format!("reading the marks of {} from {body:?}", self.name);
        let marks: serde_json::Value = serde_json::from_str(&body).context(what)?;
        let mark = |key: &str| marks[key].as_str().unwrap_or_default().trim_end().to_owned();
        Ok(Marks { ram: mark("ram"), disk: mark("disk") })
    }
}
