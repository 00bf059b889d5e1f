//! What a machinery says of itself and of its configuration.

use std::collections::HashSet;
use std::path::PathBuf;

use machinery::host::Instance;
use machinery::{DumpFormat, ErrorKind, Level, MachineInfo};

use crate::call::Call;
use crate::report::{CheckFailure, Result, demand};
use crate::session::{Session, failed};

pub fn identity(session: &Session) -> Result {
    let plugin = &session.suite().plugin;
    let file = plugin.path().file_name().unwrap_or_default().to_string_lossy();
    let name = plugin.name();
    // Cargo has no `-` in the name of a library.
    let names = [name.to_owned(), name.replace('-', "_")].map(|name| format!("libmachinery_{name}.so"));
    demand!(names.contains(&file.to_string()), "the machinery {name:?} is in a file named {file}");
    demand!(is_lowercase(name), "the name {name:?} is not lowercase");
    demand!(!plugin.version().trim().is_empty(), "the plugin has no version");
    let version = session.answer("version", Instance::version)?;
    demand!(!version.trim().is_empty(), "version says nothing");
    Ok(())
}

pub fn machines(session: &Session) -> Result {
    let infos = machine_infos(session)?;
    infos.iter().try_for_each(is_whole)?;
    is_unique("name", infos.iter().map(|info| info.name.as_str()))?;
    is_unique("ip", infos.iter().map(|info| info.ip.as_str()))?;
    is_unique("label", infos.iter().map(|info| info.label.as_str()))?;
    is_unique("mac_address", infos.iter().filter_map(|info| info.mac_address.as_deref()))?;
    let wanted: Vec<&str> = session.machines().collect();
    let names = infos.iter().map(|info| info.name.as_str());
    let found: Vec<&str> = names.filter(|name| wanted.contains(name)).collect();
    demand!(found == wanted, "the configuration has the machines {wanted:?} in this order, not {found:?}");
    // A run may change nothing of it.
    session.restore(session.machine())?;
    demand!(machine_infos(session)? == infos, "machines has another answer while one runs");
    Ok(())
}

pub fn capabilities(session: &Session) -> Result {
    let able = session.capabilities()?;
    let machine = session.machine();
    session.restore(machine)?;
    demand!(session.capabilities()? == able, "capabilities has another answer while a machine runs");
    for call in every_call(session.path("none")).iter().filter(|call| !call.is_offered(able)) {
        session.refuses(call, machine, ErrorKind::Unsupported)?;
        session.lives(machine)?;
    }
    session.nothing_is_at(&session.path("none"))
}

pub fn unknown_machine(session: &Session) -> Result {
    let able = session.capabilities()?;
    let path = session.path("none");
    for call in every_call(path.clone()).iter().filter(|call| call.is_offered(able)) {
        for name in ["no-such-machine", "", "../../etc/passwd", "%s%n"] {
            session.refuses(call, name, ErrorKind::NoSuchMachine)?;
        }
    }
    session.nothing_is_at(&path)
}

pub fn bad_configuration(session: &Session) -> Result {
    // Two machineries at a time would be one more than a host ever has.
    session.end()?;
    let mut setup = session.suite().setup.clone();
    let file = setup.config.path.display().to_string();
    for text in ["machines: [unclosed", "just words", "no_such_key: 1"] {
        setup.config.text = text.to_owned();
        match session.suite().load_with(&setup)? {
            Ok(_) => {
                return Err(CheckFailure::Failed(format!(
                    "the configuration {text:?} is taken for a good one"
                )));
            }
            Err(error) => {
                demand!(error.kind() == ErrorKind::Configuration, "{text:?} is refused as {error:?}");
                demand!(error.to_string().contains(&file), "the error does not name {file}: {error}");
            }
        }
    }
    Ok(())
}

pub fn check(session: &Session) -> Result {
    let machine = session.machine();
    session.restore(machine)?;
    let suite = session.suite();
    let (plugin, setup, recorder) = (suite.plugin.clone(), suite.setup.clone(), suite.recorder.clone());
    let report = suite.ask("check", session.timeout(), move || plugin.check(&setup, recorder))?;
    let report = report.map_err(|error| failed("check", &error))?;
    let problem = report.findings().iter().find(|finding| finding.level == Level::Problem);
    demand!(problem.is_none(), "check finds a problem with what works: {problem:?}");
    session.lives(machine)?;
    session.stop(machine)?;
    session.nothing_is_left("after a check")
}

fn machine_infos(session: &Session) -> Result<Vec<MachineInfo>> {
    session.answer("machines", |instance, _| instance.machines())
}

fn is_whole(info: &MachineInfo) -> Result {
    let name = &info.name;
    demand!(!name.trim().is_empty(), "a machine has no name: {info:?}");
    demand!(!info.ip.is_empty(), "the machine {name} has no address");
    demand!(
        !info.platform.is_empty() && is_lowercase(&info.platform),
        "the platform of {name} is {:?}",
        info.platform
    );
    demand!(
        !info.architecture.is_empty() && is_lowercase(&info.architecture),
        "the architecture of {name} is {:?}",
        info.architecture
    );
    demand!(info.agent_port > 0, "the agent of {name} has no port");
    Ok(())
}

fn is_unique<'a>(what: &str, values: impl Iterator<Item = &'a str>) -> Result {
    let mut seen = HashSet::new();
    let again = values.into_iter().find(|value| !seen.insert(*value));
    demand!(again.is_none(), "two machines have the {what} {again:?}");
    Ok(())
}

fn is_lowercase(text: &str) -> bool {
    text == text.to_lowercase()
}

fn every_call(path: PathBuf) -> [Call; 8] {
    [
        Call::State,
        Call::RestoreStart,
        Call::NorestoreStart,
        Call::Stop,
        Call::AcpiStop,
        Call::DumpMemory(path.clone(), DumpFormat::Elf),
        Call::Screenshot(path),
        Call::Prepare,
    ]
}
