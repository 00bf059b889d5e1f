//! The first answers of all agents.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use machinery_testkit::guest::AGENT_PORT;
use machinery_testkit::lab::TestNetwork;

use crate::run::{Context, Result};

/// A hundred emulated guests share a few cores.
const PATIENCE: Duration = Duration::from_secs(600);
/// The time of one try. The guest's system answers a connection late while it has no processor.
const TRY: Duration = Duration::from_secs(1);
/// The wait after a refused try.
const PAUSE: Duration = Duration::from_millis(20);

/// Waits until the agent on each address has answered.
pub fn wait_for_all(network: &TestNetwork, ips: &[Ipv4Addr]) -> Result<()> {
    let ask_all = || {
        thread::scope(|scope| {
            let asked: Vec<_> = ips.iter().map(|ip| scope.spawn(|| network.inside(|| answer(*ip)))).collect();
            asked
                .into_iter()
                .map(|asked| asked.join().map_err(|_| "a thread has panicked".to_owned()))
                .collect::<Vec<_>>()
        })
    };
    for (answer, ip) in ask_all().into_iter().zip(ips) {
        answer??.context(|| format!("the agent on {ip} does not answer"))?;
    }
    Ok(())
}

fn answer(ip: Ipv4Addr) -> io::Result<()> {
    let until = Instant::now() + PATIENCE;
    let address = SocketAddr::from((ip, AGENT_PORT));
    loop {
        let asked = TcpStream::connect_timeout(&address, TRY).and_then(|agent| ask(agent, until));
        match asked {
            Err(_) if Instant::now() < until => thread::sleep(PAUSE),
            asked => return asked,
        }
    }
}

fn ask(mut agent: TcpStream, until: Instant) -> io::Result<()> {
    agent.set_read_timeout(Some(until.saturating_duration_since(Instant::now()).max(TRY)))?;
    agent.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    agent.read_to_string(&mut answer)?;
    match answer.split(' ').nth(1) {
        Some("200") => Ok(()),
        _ => Err(io::Error::other(format!("it says {answer:?}"))),
    }
}
