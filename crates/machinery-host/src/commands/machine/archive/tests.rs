use super::*;
use crate::commands::machine::info::Description;
use std::fs;

fn info() -> Info {
    let text = |text: &str| text.to_owned();
    let machine = Description {
        name: text("m"),
        ip: text("10.0.0.1"),
        agent_port: 8000,
        os_name: text("linux"),
        os_version: text("12"),
        architecture: text("amd64"),
        bridge: text("lo"),
        mac: text("52:54:00:00:00:01"),
        disk: text(DISK),
        memory_snapshot: text(MEMORY),
        tags: Vec::new(),
        start_args: vec![text("-m")],
        tpm_state: Some(text("tpm.state")),
        guest_ip: None,
        base: None,
        base_files: Vec::new(),
        domain: None,
        copied_from: None,
    };
    Info::new(machine)
}

fn description() -> Vec<u8> {
    serde_json::to_vec(&info()).unwrap()
}

/// An archive with entries of a test's choice.
struct Packed {
    folder: tempfile::TempDir,
    path: PathBuf,
}

fn listed(name: &str, content: &[u8]) -> Listed {
    let (size, sha256) = copy(content, &mut io::sink()).unwrap();
    Listed { name: name.to_owned(), size, sha256 }
}

/// Packs entries behind a manifest of these files.
fn packed(files: Vec<Listed>, entries: &[(&str, EntryType, &[u8])]) -> Packed {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.machine");
    let mut encoder = zstd::Encoder::new(File::create(&path).unwrap(), 1).unwrap();
    encoder.include_checksum(true).unwrap();
    let mut builder = Builder::new(encoder);
    let manifest = serde_json::to_vec(&Manifest { format: FORMAT, files }).unwrap();
    let all = [(MANIFEST, EntryType::Regular, &manifest[..])];
    for (name, kind, content) in all.iter().chain(entries) {
        let mut header = Header::new_gnu();
        header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_size(content.len() as u64);
        header.set_entry_type(*kind);
        header.set_link_name("/etc/passwd").unwrap();
        header.set_cksum();
        builder.append(&header, *content).unwrap();
    }
    builder.into_inner().unwrap().finish().unwrap();
    Packed { folder, path }
}

/// Packs a valid machine with a further file of that name.
fn machine_with(name: &str, kind: EntryType, in_manifest: &str) -> Packed {
    let info = description();
    let own: [(&str, EntryType, &[u8]); 3] = [
        (INFO, EntryType::Regular, &info),
        (DISK, EntryType::Regular, b"disk"),
        (MEMORY, EntryType::Regular, b"ram"),
    ];
    let mut files: Vec<Listed> = own.iter().map(|(name, _, content)| listed(name, content)).collect();
    files.push(listed(in_manifest, b""));
    packed(files, &[&own[..], &[(name, kind, b"")]].concat())
}

fn refusal(packed: &Packed) -> String {
    let into = packed.folder.path().join("into");
    fs::create_dir(&into).unwrap();
    let refused = verify(&packed.path, &|_| ()).unwrap_err().to_string();
    // The second reading refuses it, too.
    extract(&packed.path, &info(), &into, &|_| ()).unwrap_err();
    fs::remove_dir_all(&into).unwrap();
    refused
}

#[test]
fn archive_is_verified_and_extracted_as_it_was_written() {
    let folder = tempfile::tempdir().unwrap();
    let description = description();
    let contents: [(&str, &[u8]); 5] = [
        (INFO, &description),
        (DISK, b"disk"),
        (MEMORY, &[7; 3_000_000]),
        ("vmlinuz-6.1+x", b""),
        ("tpm.state", b"keys"),
    ];
    let file = |(name, content): &(&str, &[u8])| {
        let path = folder.path().join(name);
        fs::write(&path, content).unwrap();
        (path, (*name).to_owned())
    };
    let files: Vec<_> = contents.iter().map(file).collect();
    let path = folder.path().join("archive");
    write(&File::create(&path).unwrap(), &files, &|_| ()).unwrap();
    let size = contents.iter().map(|(_, content)| content.len() as u64).sum::<u64>();
    assert_eq!(verify(&path, &|_| ()).unwrap().1, size);
    assert_eq!(verify(&path, &|_| ()).unwrap().0.machine.name, "m");
    let into = folder.path().join("into");
    fs::create_dir(&into).unwrap();
    extract(&path, &info(), &into, &|_| ()).unwrap();
    for (name, content) in contents {
        assert!(fs::read(into.join(name)).unwrap() == content, "{name}");
        let mode = fs::metadata(into.join(name)).unwrap().permissions().mode() & 0o777;
        let is_secret = [MEMORY, "tpm.state"].contains(&name);
        assert_eq!(mode, if is_secret { 0o600 } else { 0o644 }, "{name}");
    }
    // Nothing is replaced.
    assert!(extract(&path, &info(), &into, &|_| ()).is_err());
}

#[test]
fn archive_is_refused_when_any_byte_is_changed_or_missing() {
    let whole = machine_with("more", EntryType::Regular, "more");
    let bytes = fs::read(&whole.path).unwrap();
    let unpacked = zstd::decode_all(&bytes[..]).unwrap();
    verify(&whole.path, &|_| ()).unwrap();
    for at in (0..bytes.len()).step_by(7) {
        let mut changed = bytes.clone();
        changed[at] ^= 0x20;
        fs::write(&whole.path, &changed).unwrap();
        // Within a run of zeros, another offset gives the same bytes.
        let is_same = zstd::decode_all(&changed[..]).is_ok_and(|content| content == unpacked);
        assert!(is_same || verify(&whole.path, &|_| ()).is_err(), "byte {at} of {}", bytes.len());
        fs::write(&whole.path, &bytes[..at]).unwrap();
        assert!(verify(&whole.path, &|_| ()).is_err(), "cut at {at}");
    }
}

#[test]
fn archive_is_refused_when_a_name_leads_out_of_the_folder() {
    for name in ["../evil", "/etc/cron.d/evil", "a/b", "..", ".", ".unfinished", "x\ny", ""] {
        let text = refusal(&machine_with(name, EntryType::Regular, name));
        assert!(text.contains("no plain name"), "{name:?}: {text}");
        // A manifest that hides the name.
        let text = refusal(&machine_with(name, EntryType::Regular, "more"));
        assert!(
            text.contains("in the place of the file more") || text.contains("damaged"),
            "{name:?}: {text}"
        );
    }
}

#[test]
fn archive_is_refused_when_an_entry_is_no_plain_file() {
    use EntryType::{Char, Directory, Fifo, GNULongLink, GNULongName, Link, Symlink, XGlobalHeader, XHeader};
    let of_headers = [GNULongName, GNULongLink, XHeader, XGlobalHeader];
    for kind in [Symlink, Link, Directory, Fifo, Char].into_iter().chain(of_headers) {
        let text = refusal(&machine_with("more", kind, "more"));
        assert!(text.contains("in the place of the file more"), "{kind:?}: {text}");
    }
}

#[test]
fn archive_is_refused_when_its_files_are_not_those_of_the_manifest() {
    let info = description();
    let own: [(&str, EntryType, &[u8]); 3] = [
        (INFO, EntryType::Regular, &info),
        (DISK, EntryType::Regular, b"disk"),
        (MEMORY, EntryType::Regular, b"ram"),
    ];
    let files = || own.iter().map(|(name, _, content)| listed(name, content)).collect::<Vec<_>>();
    verify(&packed(files(), &own).path, &|_| ()).unwrap();
    let more: (&str, EntryType, &[u8]) = ("more", EntryType::Regular, b"");
    let twice = [files(), vec![listed(DISK, b"disk")]].concat();
    let other = [vec![listed(INFO, &info), listed(DISK, b"risk")], vec![listed(MEMORY, b"ram")]].concat();
    for (files, entries, expected) in [
        (files(), &[&own[..], &[more]].concat()[..], "not in the manifest"),
        (files(), &own[..2], "ends before memory.zst"),
        (files()[..2].to_vec(), &own[..2], "has no memory.zst"),
        (twice, &own[..], "twice"),
        (other, &own[..], "disk.qcow2 does not have the checksum"),
        (vec![], &own[..], "has no"),
    ] {
        let text = refusal(&packed(files, entries));
        assert!(text.contains(expected), "{text}");
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("text");
    fs::write(&path, "no archive").unwrap();
    assert!(verify(&path, &|_| ()).unwrap_err().to_string().contains("no exported machine"));
}
