//! The first answers of the agent in an analysis guest after a restore, in each mode.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use machinery_testkit::guest::AGENT_PORT;
use machinery_testkit::lab::{Lab, TestNetwork};

use crate::bench::figures::{Figures, Kind, Place, Unit};
use crate::bench::host::{Served, Session};
use crate::bench::plan::Plan;
use crate::bench::turns::{self, ms, timed};
use crate::run::{Context, Result};

/// The RAM of an analysis guest, in MiB.
const RAM_MIB: u32 = 256;
const TIMEOUT: Duration = Duration::from_secs(30);

/// The kinds of the answers, in the order of the requests.
const ANSWERS: [Kind; 3] = [
    answer("agent answers", "a restore is answered, until the agent has answered a GET"),
    answer("first POST", "the first POST after that, until it is answered"),
    answer("later POST", "another POST after that, until it is answered"),
];

const fn answer(name: &'static str, what: &'static str) -> Kind {
    Kind { by: "", name, what, unit: Unit::Ms }
}

/// Measures how long the agent takes to answer after a restore, in each mode.
pub fn measure(lab: &Lab, plan: &Plan, figures: &mut Figures) -> Result<()> {
    turns::take(
        plan.modes.clone(),
        |_| plan.rounds,
        |mode, rounds| {
            let served = Served { cwd: lab.cwd(), machinery: "qemu", memory_mib: RAM_MIB };
            let mut session = Session::start_in(Some(lab.network()), served, mode)?;
            for round in 0..=rounds {
                session.prepare("m1")?;
                session.act("restore_start", "m1")?;
                let restored = Instant::now();
                ask(lab, "GET /")?;
                let answered = ms(restored.elapsed());
                let ((), first) = timed(|| ask(lab, "POST /mkdtemp"))?;
                let ((), later) = timed(|| ask(lab, "POST /mkdtemp"))?;
                session.act("stop", "m1")?;
                if round > 0 {
                    for (kind, took) in ANSWERS.into_iter().zip([answered, first, later]) {
                        figures.add(Place::Qemu(RAM_MIB), kind.by(mode.word()), took);
                    }
                }
            }
            session.end()
        },
    )
}

/// Sends the agent a request, and reads the answer to its end.
fn ask(lab: &Lab, request: &str) -> Result<()> {
    let what = || format!("asking the agent: {request}");
    let address = SocketAddr::from((TestNetwork::machine(1), AGENT_PORT));
    let connect = || TcpStream::connect_timeout(&address, TIMEOUT);
    let mut agent = lab.network().inside(connect)?.context(what)?;
    agent.set_read_timeout(Some(TIMEOUT)).context(what)?;
    let form = "Content-Type: application/x-www-form-urlencoded\r\nContent-Length: 10\r\n\r\nprefix=tmp";
    let rest = if request.starts_with("POST") { form } else { "\r\n" };
    write!(agent, "{request} HTTP/1.0\r\n{rest}").context(what)?;
    let mut answer = String::new();
    agent.read_to_string(&mut answer).context(what)?;
    match answer.split(' ').nth(1) {
        Some("200") => Ok(()),
        _ => Err(format!("{}: it says {answer}", what()).into()),
    }
}
