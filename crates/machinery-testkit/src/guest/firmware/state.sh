#!/bin/sh
# /cgi-bin/firmware?WORD: writes the word to a new variable of the firmware, extends a register of the TPM, and defines an
# index in its permanent memory, with the length of the word as its number. Without a word, it only reads them. The code
# of the last definition stays in /tmp.
variables=/sys/firmware/efi/efivars
[ -e "$variables/PK-8be4df61-93ca-11d2-aa0d-00e098032b8c" ] || mount -t efivarfs none "$variables" 2> /dev/null

# Sends a command to the TPM, and shows the code of its answer.
tpm() {
    exec 3<> /dev/tpm0
    printf "$1" >&3
    dd bs=4096 count=1 <&3 2> /dev/null | dd bs=1 skip=6 count=4 2> /dev/null | hexdump -ve '1/1 "%02x"'
    exec 3>&-
}

session='\x00\x00\x00\x09\x40\x00\x00\x09\x00\x00\x00\x00\x00'
if [ -n "$QUERY_STRING" ]; then
    printf '\x07\x00\x00\x00%s' "$QUERY_STRING" > "$variables/Machinery$QUERY_STRING-5f0d3a52-6c1f-4a0e-9d2e-6d61636e7279"
    # TPM2_PCR_Extend of the register 16, SHA-256.
    digest='\x0b\x0b\x0b\x0b\x0b\x0b\x0b\x0b\x0b\x0b\x0b\x0b\x0b\x0b\x0b\x0b'
    extended=$(tpm "\x80\x02\x00\x00\x00\x41\x00\x00\x01\x82\x00\x00\x00\x10$session\x00\x00\x00\x01\x00\x0b$digest$digest")
    # TPM2_NV_DefineSpace of 8 bytes, by the owner.
    public="\x00\x0e\x01\x50\x00\x0${#QUERY_STRING}\x00\x0b\x02\x06\x00\x06\x00\x00\x00\x08"
    tpm "\x80\x02\x00\x00\x00\x2d\x00\x00\x01\x2a\x40\x00\x00\x01$session\x00\x00$public" > /tmp/defined
fi

# TPM2_NV_ReadPublic
read_public() {
    tpm "\x80\x01\x00\x00\x00\x0e\x00\x00\x01\x69\x01\x50\x00\x0$1"
}
values=$(cat "$variables"/Machinery* | tr -cd a-z)
register=$(cat /sys/class/tpm/tpm0/pcr-sha256/16)
printf 'Content-Type: application/json\r\n\r\n'
printf '{"variables": "%s", "register": "%s", "extended": "%s", "defined": "%s", "of_snapshot": "%s", "of_run": "%s"}\n' \
    "$values" "$register" "$extended" "$(cat /tmp/defined)" "$(read_public 8)" "$(read_public 3)"
