#include "box.h"
void sbx_files_serve(const struct sbx_box *box, int sock)
{
	(void)box;
	(void)sock;
}
