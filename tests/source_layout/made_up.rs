//! Small made-up crates with one violation each.

use std::fs;

use crate::floors;

/// The violations of a crate `crates/one` with these files below `src`, by this list of floors.
fn found(files: &[(&str, &str)], list: &str) -> Vec<String> {
    let root = tempfile::tempdir().unwrap();
    let source = root.path().join("crates/one/src");
    for (name, text) in files {
        let file = source.join(name);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, text).unwrap();
    }
    let floors = floors::parse(&format!("[crates/one]\n{list}")).unwrap();
    crate::violations(root.path(), &floors).unwrap()
}

fn assert_only(found: &[String], parts: &[&str]) {
    assert_eq!(found.len(), 1, "{found:#?}");
    for part in parts {
        assert!(found[0].contains(part), "no {part:?} in {}", found[0]);
    }
}

const ROOT: &str = "mod a;\nmod b;\n";

#[test]
fn tree_in_one_direction_passes() {
    let files = [("lib.rs", ROOT), ("a.rs", "use crate::b::B;\nfn f(_: B) {}"), ("b.rs", "pub struct B;")];
    assert_eq!(found(&files, "lib\na\nb"), [""; 0]);
}

#[test]
fn circle_is_reported_with_files_and_lines() {
    let files = [
        ("lib.rs", ROOT),
        ("a.rs", "use crate::b::B;\npub struct A;"),
        ("b.rs", "\npub struct B(super::a::A);"),
    ];
    let parts =
        ["circle of 2 files", "a.rs -> crates/one/src/b.rs: line 1 crate::b::B", "line 2 super::a::A"];
    assert_only(&found(&files, "lib\na b"), &parts);
}

#[test]
fn circle_is_reported_between_parent_and_child() {
    let files = [
        ("lib.rs", "mod a;"),
        ("a/mod.rs", "mod c;\npub struct A;\nfn f() { c::g() }"),
        ("a/c.rs", "use super::A;\npub fn g() {}\nfn h(_: A) {}"),
    ];
    assert_only(&found(&files, "lib\na"), &["circle of 2 files", "line 3 c::g", "line 1 super::A"]);
}

#[test]
fn circle_is_reported_through_re_exports_and_globs() {
    let root = "mod a;\nmod b;\npub use b::B;\nuse a::A;";
    let files =
        [("lib.rs", root), ("a.rs", "pub struct A(crate::B);"), ("b.rs", "use super::*;\npub struct B(A);")];
    assert_only(
        &found(&files, "lib\na b"),
        &["crates/one/src/a.rs, crates/one/src/b.rs", "crate::B", "line 2 A"],
    );
}

#[test]
fn circle_is_reported_within_macros() {
    let files = [
        ("lib.rs", ROOT),
        ("a.rs", "use crate::b::B;\npub const A: B = B;"),
        ("b.rs", "pub struct B;\nfn f() { drop(format!(\"{}\", crate::a::A)); }"),
    ];
    assert_only(&found(&files, "lib\na b"), &["circle of 2 files", "line 2 crate::a::A"]);
}

#[test]
fn tests_and_module_declarations_are_no_edges() {
    let b = "pub struct B;\n#[cfg(test)]\nmod tests { use crate::a::A; }\n#[cfg(test)]\nuse crate::a::A;";
    let a = "use crate::b::B;\npub struct A(B);\n#[cfg(test)]\nmod tests;";
    assert_eq!(found(&[("lib.rs", ROOT), ("a.rs", a), ("b.rs", b)], "lib\na\nb"), [""; 0]);
}

#[test]
fn import_that_goes_up_is_reported() {
    let files = [("lib.rs", ROOT), ("a.rs", "pub struct A;"), ("b.rs", "use crate::a;\nfn f(_: a::A) {}")];
    assert_only(&found(&files, "lib\na\nb"), &["b.rs:2: a::A goes up to a"]);
}

#[test]
fn list_and_modules_must_match() {
    let files = [("lib.rs", ROOT), ("a.rs", ""), ("b.rs", "")];
    assert_only(&found(&files, "lib\na"), &["module b has no floor"]);
    assert_only(&found(&files, "lib\na\nb c"), &["module c that does not exist"]);
    assert!(floors::parse("[one]\na\na").unwrap_err().contains("twice"));
}

#[test]
fn program_uses_its_library_from_above() {
    let files =
        [("lib.rs", "pub mod a;"), ("a.rs", "pub fn f() {}"), ("main.rs", "fn main() { one::a::f() }")];
    assert_eq!(found(&files, "main\nlib a"), [""; 0]);
    assert_only(&found(&files, "lib a\nmain"), &["main.rs:1: one::a::f goes up to a"]);
}

#[test]
fn long_file_is_reported_without_its_tests() {
    let code = |lines| "const _: () = ();\n".repeat(lines);
    let tests = format!("#[cfg(test)]\nmod tests {{\n{}}}\n", code(100));
    assert_eq!(found(&[("lib.rs", &(code(350) + &tests))], "lib"), [""; 0]);
    assert_only(&found(&[("lib.rs", &(code(351) + &tests))], "lib"), &["lib.rs: 351 lines"]);
}

#[test]
fn long_function_is_reported() {
    let function = |lines| format!("/// Comment.\nfn f() {{\n{}}}\n", "    ();\n".repeat(lines));
    assert_eq!(found(&[("lib.rs", &function(58))], "lib"), [""; 0]);
    assert_only(&found(&[("lib.rs", &function(59))], "lib"), &["lib.rs:2: fn f has 61 lines"]);
    let method = format!("struct S;\nimpl S {{ {} }}", function(59));
    assert_only(&found(&[("lib.rs", &method)], "lib"), &["fn f has 61 lines"]);
    assert_eq!(found(&[("lib.rs", &format!("#[cfg(test)]\n{}", function(59)))], "lib"), [""; 0]);
}

#[test]
fn result_within_result_is_reported() {
    let code = "type R = Result<Result<(), ()>, ()>;\n#[cfg(test)]\nmod tests { type R = Result<Result<(), ()>, ()>; }";
    assert_only(&found(&[("lib.rs", code)], "lib"), &["lib.rs:1: a Result within a Result"]);
    for qualified in [
        "fn f() -> Result<std::result::Result<(), ()>, ()> { Ok(Ok(())) }",
        "type R = std::result::Result<Result<(), ()>, ()>;",
        "type R = std::io::Result<other::Result<\n()>>;",
        "struct S { field: Vec<Result<other::Result<()>>> }",
        "fn f() { let _ = g::<Result<other::Result<()>>>(); }",
    ] {
        assert_only(&found(&[("lib.rs", qualified)], "lib"), &["lib.rs:1: a Result within a Result"]);
    }
    assert_eq!(found(&[("lib.rs", "type R = Result<Option<Result<(), ()>>, Other<()>>;")], "lib"), [""; 0]);
}
