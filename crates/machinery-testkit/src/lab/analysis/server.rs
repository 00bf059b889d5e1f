//! The server of a sample: answers each name with its own address, and each request with a page.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::Result;
use crate::error::Context;
use crate::network::TestNetwork;

const PAGE: &str = "HTTP/1.1 200 OK\r\nContent-Length: 6\r\nConnection: close\r\n\r\norders";
const PATIENCE: Duration = Duration::from_secs(10);

/// A running server; it ends when dropped.
pub struct Server {
    ends: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    /// Wakes the threads at the end.
    wake: Box<dyn Fn() + Send + Sync>,
}

impl Server {
    /// Starts the server on the host's address of the network.
    pub fn start(network: &TestNetwork) -> Result<Self> {
        let what = || "starting the server of a sample".to_owned();
        let at = |port| SocketAddr::from((TestNetwork::HOST, port));
        let names = network.inside(|| UdpSocket::bind(at(53)))?.context(what)?;
        let pages = network.inside(|| TcpListener::bind(at(80)))?.context(what)?;
        let ends = Arc::new(AtomicBool::new(false));
        let (waking, waking_pages) = (names.try_clone().context(what)?, network.clone());
        let ended = [Arc::clone(&ends), Arc::clone(&ends)];
        let [names_end, pages_end] = ended;
        let threads = vec![
            thread::spawn(move || answer_names(&names, &names_end)),
            thread::spawn(move || answer_requests(&pages, &pages_end)),
        ];
        let wake = move || {
            // A thread that has ended needs no wake.
            let _ = waking.send_to(&[], at(53));
            let _ = waking_pages.inside(|| std::net::TcpStream::connect_timeout(&at(80), PATIENCE).map(drop));
        };
        Ok(Server { ends, threads, wake: Box::new(wake) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::SeqCst);
        (self.wake)();
        for thread in self.threads.drain(..) {
            // A panic has been printed.
            let _ = thread.join();
        }
    }
}

fn answer_names(socket: &UdpSocket, ends: &AtomicBool) {
    let mut query = [0; 512];
    while let Ok((length, from)) = socket.recv_from(&mut query) {
        if ends.load(Ordering::SeqCst) {
            return;
        }
        if let Some(answer) = answer(&query[..length]) {
            // A guest that was stopped needs no answer.
            let _ = socket.send_to(&answer, from);
        }
    }
}

/// Returns the answer to a query with one question: a record of type A, which refers to the question's name.
fn answer(query: &[u8]) -> Option<Vec<u8>> {
    let id = query.get(..2)?;
    let question = query.get(12..)?;
    let mut answer = [id, &[0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0], question].concat();
    answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
    answer.extend(TestNetwork::HOST.octets());
    Some(answer)
}

fn answer_requests(listener: &TcpListener, ends: &AtomicBool) {
    while let Ok((mut client, _)) = listener.accept() {
        if ends.load(Ordering::SeqCst) {
            return;
        }
        let mut request = [0; 4096];
        // A guest may be stopped in the middle of its request.
        let _ = client.set_read_timeout(Some(PATIENCE));
        if client.read(&mut request).is_ok_and(|length| length > 0) {
            let _ = client.write_all(PAGE.as_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_is_answered_with_the_address_of_the_host() {
        let query = b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x01a\0\0\x01\0\x01";
        let answer = answer(query).unwrap();
        assert_eq!(answer[..12], *b"\x12\x34\x81\x80\0\x01\0\x01\0\0\0\0");
        assert_eq!(answer[12..19], query[12..]);
        assert!(answer.ends_with(&TestNetwork::HOST.octets()));
        assert_eq!(super::answer(b"short"), None);
    }
}
