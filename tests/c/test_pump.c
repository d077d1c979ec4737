/* Copying between a command's pipes and what lies behind them: relays, the journal, the end. */
#include "box.h"
#include "check.h"

#include <stdlib.h>
#include <sys/mman.h>

static char room[SBX_PUMP_ROOM];
static int command[2], host[2]; /* pipes */
static struct sbx_log no_log = { .file = -1 };

int sbx_cred_borrow(const struct sbx_plan *p, uint32_t uid, uint32_t gid, struct sbx_error *err)
{
	(void)p, (void)uid, (void)gid, (void)err;
	return 0;
}

static void open_pipes(void)
{
	CHECK(pipe2(command, O_NONBLOCK) == 0 && pipe(host) == 0);
}

static void close_pipes(void)
{
	close(command[0]), close(command[1]), close(host[0]), close(host[1]);
}

/* Pumps close what they were given. */
static struct sbx_pump outward(void)
{
	return (struct sbx_pump){ .from = dup(command[0]), .to = dup(host[1]), .room = room };
}

static void relays_pieces(void)
{
	char got[64] = "";

	open_pipes();
	struct sbx_pump p = outward();
	CHECK(sbx_pump_fill(&p) == 0 && p.from >= 0); /* nothing there yet */
	CHECK(write(command[1], "hello", 5) == 5);
	CHECK(sbx_pump_fill(&p) == 1 && p.size == 5);
	CHECK(sbx_pump_drain(&p, &no_log) == 0 && p.size == 0);
	CHECK(read(host[0], got, sizeof got) == 5 && memcmp(got, "hello", 5) == 0);
	close(command[1]);
	command[1] = -1;
	CHECK(sbx_pump_fill(&p) == 0 && p.from == -1 && p.to == -1); /* the end */
	close_pipes();
}

/* A reader that takes nothing: the piece stays in hand, nothing waits, and no byte is lost. */
static void holds_what_nobody_takes(void)
{
	static char data[SBX_PUMP_ROOM], got[SBX_PUMP_ROOM * 4];
	size_t sent = 0, taken = 0;

	open_pipes();
	struct sbx_pump p = outward();
	for (int i = 0; i < 200; i++) {
		for (size_t j = 0; j < sizeof data; j++)
			data[j] = (char)(sent + j);
		if (!p.size) {
			ssize_t n = write(command[1], data, sizeof data / 2);
			sent += n > 0 ? (size_t)n : 0;
			(void)sbx_pump_fill(&p);
		}
		CHECK(sbx_pump_drain(&p, &no_log) == 0);
		if (i < 50)
			continue;
		ssize_t n = read(host[0], got, 1000); /* slowly; there is something by now */
		CHECK(n > 0);
		for (ssize_t j = 0; j < n; j++)
			CHECK(got[j] == (char)(taken + (size_t)j));
		taken += n > 0 ? (size_t)n : 0;
	}
	CHECK(sent > taken && sent - taken <= 4 * SBX_PUMP_ROOM);
	sbx_pump_end(&p);
	CHECK(p.from == -1 && p.size == 0);
	close_pipes();
}

static void ends_when_its_reader_is_gone(void)
{
	signal(SIGPIPE, SIG_IGN);
	open_pipes();
	struct sbx_pump p = outward();
	close(host[0]);
	CHECK(write(command[1], "x", 1) == 1);
	CHECK(sbx_pump_fill(&p) == 1);
	CHECK(sbx_pump_drain(&p, &no_log) == -EPIPE && p.from == -1);
	host[0] = -1;
	close_pipes();
}

/* After the end of those who wrote, what is there counts; and not what somebody else goes on writing. */
static void knows_the_last_byte(void)
{
	open_pipes();
	struct sbx_pump p = outward();
	CHECK(!sbx_pump_last(&p, false));
	CHECK(write(command[1], "last", 4) == 4);
	CHECK(!sbx_pump_last(&p, true) && p.left == 4);
	CHECK(sbx_pump_fill(&p) == 1 && p.size == 4 && p.left == 0);
	CHECK(write(command[1], "more", 4) == 4);
	CHECK(sbx_pump_last(&p, true));
	sbx_pump_end(&p);
	p = outward();
	CHECK(read(command[0], room, 4) == 4);
	CHECK(sbx_pump_last(&p, true)); /* nothing there */
	sbx_pump_end(&p);
	close_pipes();
}

static void feeds_inward(void)
{
	char got[8];

	open_pipes();
	CHECK(fcntl(host[0], F_GETFL) == O_RDONLY);
	struct sbx_pump p = { .from = dup(host[0]), .to = dup(command[1]), .inward = true, .room = room };
	CHECK(sbx_pump_fill(&p) == 0 && p.from >= 0); /* does not block on an empty pipe */
	CHECK(write(host[1], "in", 2) == 2);
	CHECK(sbx_pump_fill(&p) == 1 && sbx_pump_drain(&p, &no_log) == 0);
	CHECK(read(command[0], got, sizeof got) == 2);
	CHECK(fcntl(host[0], F_GETFL) == O_RDONLY); /* the host's flags are its own */
	sbx_pump_end(&p);
	close_pipes();
}

static int make_journal(uint64_t keep, uint32_t state)
{
	struct sbx_journal head = { .magic = SBX_JOURNAL_MAGIC,
				    .layout = SBX_LAYOUT,
				    .keep = keep,
				    .ring = keep + SBX_JOURNAL_SLACK,
				    .state = state };
	int file = memfd_create("journal", 0);

	CHECK(ftruncate(file, (long)(SBX_JOURNAL_HEAD + 2 * head.ring)) == 0);
	CHECK(pwrite(file, &head, sizeof head, 0) == sizeof head);
	return file;
}

static void refuses_false_journals(void)
{
	struct sbx_log log;
	int good = make_journal(1000, SBX_JOURNAL_NEW), used = make_journal(1000, SBX_JOURNAL_ENDED);
	int none = make_journal(0, SBX_JOURNAL_NEW), huge = memfd_create("huge", 0);

	CHECK(sbx_log_open(&log, good) == 0);
	CHECK(sbx_log_open(&log, used) == -EINVAL);
	CHECK(sbx_log_open(&log, none) == -EINVAL);
	CHECK(sbx_log_open(&log, huge) == -EINVAL); /* empty */
	CHECK(sbx_log_open(&log, -1) == -EBADF);
	struct sbx_journal head;
	CHECK(pread(good, &head, sizeof head, 0) == sizeof head);
	head.keep = 1ULL << 40, head.ring = head.keep + SBX_JOURNAL_SLACK;
	CHECK(pwrite(huge, &head, sizeof head, 0) == sizeof head);
	CHECK(sbx_log_open(&log, huge) == -EINVAL);
	head.keep = 1000, head.ring = 1000;
	CHECK(pwrite(huge, &head, sizeof head, 0) == sizeof head);
	CHECK(sbx_log_open(&log, huge) == -EINVAL);
	close(good), close(used), close(none), close(huge);
}

static void journal_is_a_ring(void)
{
	struct sbx_log log;
	struct sbx_journal head;
	const uint64_t keep = 1000, ring = keep + SBX_JOURNAL_SLACK, total = 3 * ring + 123;
	int file = make_journal(keep, SBX_JOURNAL_NEW);

	CHECK(sbx_log_open(&log, file) == 0);
	struct sbx_pump p = { .from = -1, .to = -1, .stream = 1, .room = room };
	for (uint64_t done = 0; done < total;) {
		p.size = total - done < 50000 ? (uint32_t)(total - done) : 50000;
		for (uint32_t i = 0; i < p.size; i++)
			room[i] = (char)((done + i) % 251);
		done += p.size;
		CHECK(sbx_pump_drain(&p, &log) == 0 && p.size == 0);
	}
	CHECK(pread(file, &head, sizeof head, 0) == sizeof head);
	CHECK(head.written[1] == total && head.written[0] == 0);
	for (uint64_t at = total - keep; at < total; at++) {
		char byte;
		CHECK(pread(file, &byte, 1, (long)(SBX_JOURNAL_HEAD + ring + at % ring)) == 1);
		CHECK(byte == (char)(at % 251));
	}
	close(file);
}

int main(void)
{
	RUN(relays_pieces);
	RUN(holds_what_nobody_takes);
	RUN(ends_when_its_reader_is_gone);
	RUN(knows_the_last_byte);
	RUN(feeds_inward);
	RUN(refuses_false_journals);
	RUN(journal_is_a_ring);
	return check_status();
}
